"""How a worker is chosen; a file's name is a policy's."""

from __future__ import annotations

from phloem.router.policies._base import Policy
from phloem.utils.registry import Registry

POLICIES: Registry[type[Policy]] = Registry("phloem.router.policies", "policy", "Choice")
