"""Budget, the pass that turns milliseconds, megabytes or a quality into ratios."""
