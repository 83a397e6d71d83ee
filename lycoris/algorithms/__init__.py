"""Adapters as modules: LoCon, LoHa and LoKr, and what is read beside them: full and norm differences, (IA)^3."""

from lycoris.algorithms.files import MODULES, load, save
from lycoris.algorithms.locon import LoConModule
from lycoris.algorithms.loha import LoHaModule
from lycoris.algorithms.lokr import LoKrModule, LoKrOptions
from lycoris.algorithms.module import LycorisModule
from lycoris.algorithms.ranked import ModuleOptions
from lycoris.algorithms.unfactored import FullModule, IA3Module, NormModule
from lycoris.sources import FactorSpec, SourceBinding, weight_source

__all__ = [
    "MODULES",
    "FactorSpec",
    "FullModule",
    "IA3Module",
    "LoConModule",
    "LoHaModule",
    "LoKrModule",
    "LoKrOptions",
    "LycorisModule",
    "ModuleOptions",
    "NormModule",
    "SourceBinding",
    "load",
    "save",
    "weight_source",
]
