"""Where the clients run: one file a launcher, behind one call."""

from fedunlearn.federation.launchers import local, ray
from fedunlearn.federation.launchers.base import launch

__all__ = ["launch", "local", "ray"]
