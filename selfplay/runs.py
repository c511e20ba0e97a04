"""Run configs: read, checked, changed. A run itself is started by the command `selfplay run`, in a process of its own."""

from data_contracts.installation import ROOT
from flows.cli.presets import preset_paths
from flows.config import RunConfig, load_run

__all__ = ["ROOT", "RunConfig", "load_run", "preset_paths"]
