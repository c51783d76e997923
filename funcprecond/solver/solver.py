"""The protocol of stage 3: solvers."""

from typing import Any, ClassVar, Protocol

from funcprecond.evidence import Evidence
from funcprecond.need import Need
from funcprecond.tree import Params

__all__ = ["Solver"]


class Solver(Protocol):
    """The computation of ``C^-1 g``: a frozen dataclass of hyperparameters, without state.

    The work has two parts. :meth:`prepare` is expensive, such as a decomposition, and runs at an
    interval. :meth:`apply` is cheap and runs at every step.

    Attributes:
        accepts: the classes of representations with which the solver works.
        needs: the needs whose values :meth:`apply` uses in addition to the gradient, if the
            evidence contains them.
        staggers: whether a refresh can be spread over several steps. If it can, :meth:`prepare` has
            a third argument ``turn``, a :class:`funcprecond.need.Turn` that selects the factors
            that are due.
    """

    accepts: ClassVar[tuple[type, ...]]
    needs: ClassVar[tuple[Need, ...]] = ()
    staggers: ClassVar[bool] = False

    def init(self, representation: Any) -> Any:
        """The factor before the first refresh: that of the identity, or of a curvature of zero.

        Args:
            representation: the curvature matrix before the first measurement.

        Returns:
            The factor, a tree of tensors.
        """
        ...

    def prepare(self, representation: Any, previous: Any) -> Any:
        """The factor of the curvature matrix.

        Args:
            representation: the curvature matrix.
            previous: the old factor, of which parts are kept where no new ones can be computed.

        Returns:
            The factor, a tree of tensors.
        """
        ...

    def apply(self, factor: Any, grads: Params, evidence: Evidence | None = None) -> Params:
        """The direction ``C^-1 g``.

        Args:
            factor: the result of :meth:`prepare` or :meth:`init`.
            grads: the gradient g.
            evidence: the evidence of this step, if there is any.

        Returns:
            The direction, with the names and dtypes of ``grads``.
        """
        ...
