"""The neural memory: a small network per sample and head that learns by gradient steps while it reads."""

from titanfunc.config import WriteRule
from titanfunc.memory.chunked import scan
from titanfunc.memory.network import MemoryNet, from_module, mlp
from titanfunc.memory.recurrent import scan_recurrent
from titanfunc.memory.slots import Documents
from titanfunc.memory.state import Gates, MemoryState, init_state
from titanfunc.memory.update import Updated, update

__all__ = [
    "Documents", "Gates", "MemoryNet", "MemoryState", "Updated", "WriteRule", "from_module", "init_state", "mlp",
    "scan", "scan_recurrent", "update",
]  # fmt: skip
