"""Where the clients run: one file a launcher, behind one call."""

from fedunlearn.federation.launchers import local, ray
from fedunlearn.federation.launchers.base import check_launcher, launch

__all__ = ["check_launcher", "launch", "local", "ray"]
