"""The registry reads its names from a folder and explains a wrong one."""

import pytest

from phloem.core.errors import ConfigError
from phloem.utils.registry import Registry


def test_names_come_from_the_folder_and_modules_are_imported_on_demand() -> None:
    registry = Registry("phloem.utils", "tool")
    assert "registry" in registry.names()
    assert registry.module("registry").Registry is Registry


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown tool 'regestry' \(did you mean 'registry'\?\); known: .*registry"):
        Registry("phloem.utils", "tool").module("regestry")
