"""What ms-swift imports: registers ktops, so that ``--experts_impl ktops`` is known.

Training of a model none of whose experts run through ktops is then an error.
"""

from ktops.integrations import enable, training

enable()
training.enable()
