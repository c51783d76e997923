"""The contract of stage 3: what a solver has to be."""

from typing import Any, ClassVar, Protocol

from funcprecond.evidence import Evidence
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Solver"]


class Solver(Protocol):
    """How ``C^-1 g`` is computed: a frozen dataclass of hyperparameters, without state.

    The work is in two parts. :meth:`prepare` is expensive, such as a decomposition, and runs at an
    interval; :meth:`apply` is cheap and runs at every step.

    Attributes:
        accepts: the representations that it can solve with.
        needs: what :meth:`apply` takes from the evidence, if it is there, beside the gradient.
        staggers: whether a refresh can be spread over several steps. Then :meth:`prepare` has a
            third argument ``turn``, a :class:`funcprecond.need.Turn`, which says whose turn it is.
    """

    accepts: ClassVar[tuple[type, ...]]
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: Any) -> Any:
        """The factor before the first refresh: that of an identity or of a curvature of zero."""
        ...

    def prepare(self, representation: Any, previous: Any) -> Any:
        """The factor of the curvature matrix.

        Args:
            representation: the matrix.
            previous: the old factor, for what cannot be computed anew.
        """
        ...

    def apply(self, factor: Any, grads: Params, evidence: Evidence | None = None) -> Params:
        """The direction, in the names and dtypes of ``grads``."""
        ...
