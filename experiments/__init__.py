import common  # noqa: F401  before torch: it says how threads wait
