"""EGRSD's neighbours: methods on the same rollouts and the same teacher pass, and flags for
ablations.

train.py works without this package, and does not know it; __main__.py is its command.
"""

from family.explain import explain
from family.methods import METHODS
from family.settings import FamilySettings, bring, check, is_used, without_effect

__all__ = ["METHODS", "FamilySettings", "bring", "check", "explain", "is_used", "without_effect"]
