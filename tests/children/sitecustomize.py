"""What Python runs first in the processes that tests start: see ``only_what_most_users_have`` in conftest.py."""

import sys
from typing import Any

absent: Any = None
sys.modules["hypothesis"] = sys.modules["bitsandbytes"] = absent
