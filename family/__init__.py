"""EGRSD's neighbours: methods on the same rollouts and the same teacher pass, and flags for
ablations.

The core works without this package. __main__.py is its command.
"""

from family.methods import METHODS
from family.settings import FamilySettings

__all__ = ["METHODS", "FamilySettings"]
