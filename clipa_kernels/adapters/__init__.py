"""Models of other libraries with the operations of this one inside; and batches in parts."""

from .accumulate import accumulated
from .api import Report, accelerate, restore
