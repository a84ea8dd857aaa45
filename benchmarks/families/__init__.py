"""Model families of the field, small and with random weights: what can be cut, and what stays."""

from benchmarks.families.base import Family
from benchmarks.families.decoders import DECODERS
from benchmarks.families.detection import DETECTION
from benchmarks.families.speech import SPEECH
from benchmarks.families.tabular import TABULAR
from benchmarks.families.text import TEXT
from benchmarks.families.vision import VISION

DOMAINS = (TEXT, DECODERS, SPEECH, VISION, DETECTION, TABULAR)
FAMILIES: tuple[Family, ...] = tuple(f for domain in DOMAINS for f in domain.families)
QUICK = ("BERT", "ResNet", "GCN, matrix")
