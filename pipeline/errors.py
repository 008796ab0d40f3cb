"""What `pipeline` raises: each message says what was expected, what was found, and the remedy."""


class PipelineError(ValueError):
    """An input, a name or a configuration that the pipeline cannot use."""


class SourceError(PipelineError):
    """The images are missing, in an unexpected layout, or unsafe to read."""


class ShardError(PipelineError):
    """A tar shard, or the index of a folder of them, is missing, damaged or inconsistent."""


class UnknownModelError(PipelineError):
    """No encoder is known by this name."""


class WeightsError(PipelineError):
    """The encoder's weights cannot be found, or do not fit its architecture."""


class PlanError(PipelineError):
    """The samples cannot be laid out over Zarr shards as asked, or the plan is not the store's."""
