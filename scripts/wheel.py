"""What hatch does beside the usual: a wheel has the demo's tasks inside taskguard, see `taskguard.demo.apps`.

Not where taskguard is installed in place: they are found in the repository then.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DemoInside(BuildHookInterface[Any]):
    """No package `workers` is installed beside the user's own."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before each build."""
        if version == "standard":
            build_data["force_include"]["workers"] = "taskguard/demo/programs/workers"
