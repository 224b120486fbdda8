"""A nested optimizer: a base optimizer and networks that learn, while it trains, how to use it."""

from titanfunc.optim.nested.core import nested
from titanfunc.optim.nested.groups import Groups, by_role
from titanfunc.optim.nested.meta import HeldOut
from titanfunc.optim.nested.state import NestedState

__all__ = ["Groups", "HeldOut", "NestedState", "by_role", "nested"]
