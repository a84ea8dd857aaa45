"""Budget: from milliseconds, megabytes or a quality to the units that each group keeps."""
