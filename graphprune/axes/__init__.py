"""Axis analysis: which dimensions of which tensors are one, and what can be removed from them."""

from graphprune.axes.analysis import Axes as Axes
from graphprune.axes.analysis import infer_axes as infer_axes
from graphprune.axes.frozen import Frozen as Frozen
from graphprune.axes.frozen import frozen_parameters as frozen_parameters
from graphprune.axes.groups import AxisGroup as AxisGroup
from graphprune.axes.groups import AxisGroups as AxisGroups
from graphprune.axes.groups import Channels as Channels
from graphprune.axes.groups import Occurrence as Occurrence
from graphprune.axes.groups import axis_groups as axis_groups
from graphprune.axes.roles import ROLES as ROLES
