"""Puts the modules of the boots on the path of modules, and those of the kit."""

import pathlib
import sys

import kit_path  # noqa: F401

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / 'boot'))
