"""Puts the kit on the path of modules: imported before any module of it."""

import pathlib
import sys

KIT = pathlib.Path(__file__).resolve().parents[1] / 'kit'
sys.path.insert(0, str(KIT))
