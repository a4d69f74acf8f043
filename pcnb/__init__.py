"""Deep networks trained by predictive coding."""
__version__ = "0.1.0"

from .network import *
from .convolution import *
from .energy import *
from .inference import *
from .schedules import *
from .skip import *
from .lalr import *
from .learning import *
from .nudging import *
from .log_determinant import *
from .models import *
from .decoders import *
from .data import *
from .augmentation import *
from .diagnostics import *
from .training import *
from .memory import *
from .recipes import *

from types import ModuleType as _Module
__all__ = [name for name, value in list(globals().items()) if not (name.startswith("_") or isinstance(value, _Module))]
