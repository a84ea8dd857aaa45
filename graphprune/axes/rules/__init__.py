"""One rule an operator. Importing this package registers them all."""

from graphprune.axes.rules import contraction as contraction
from graphprune.axes.rules import elementwise as elementwise
from graphprune.axes.rules import frequency as frequency
from graphprune.axes.rules import images as images
from graphprune.axes.rules import indexing as indexing
from graphprune.axes.rules import matrices as matrices
from graphprune.axes.rules import recurrent as recurrent
from graphprune.axes.rules import reduction as reduction
from graphprune.axes.rules import shape as shape
from graphprune.axes.rules.registry import REWRITERS as REWRITERS
from graphprune.axes.rules.registry import RULES as RULES
