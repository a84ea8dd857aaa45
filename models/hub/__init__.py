"""Folders as the hub has them: what lies beside an ONNX file so that others load it."""

from graphprune.models.hub.consumers import Finding as Finding
from graphprune.models.hub.consumers import check as check
from graphprune.models.hub.consumers import consumer_names as consumer_names

__all__ = ["Finding", "check", "consumer_names"]
