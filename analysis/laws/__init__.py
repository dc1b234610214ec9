"""Laws: forms, their fits and their comparison, and what the data say about size, training, context and batch."""

from analysis.laws.batch import batch_laws, context_law, engine_batch_law, measured_batch_law
from analysis.laws.comparison import FormComparison, FormError, Ranking, compare_forms
from analysis.laws.find import find_laws
from analysis.laws.fit import FittedForm, fit_form
from analysis.laws.forms import FORMS, Form, find_form
from analysis.laws.law import Curve, Law, LawFindings, LawPoint
from analysis.laws.size import size_law, training_law

__all__ = [
    "FORMS",
    "Curve",
    "FittedForm",
    "Form",
    "FormComparison",
    "FormError",
    "Law",
    "LawFindings",
    "LawPoint",
    "Ranking",
    "batch_laws",
    "compare_forms",
    "context_law",
    "engine_batch_law",
    "find_form",
    "find_laws",
    "fit_form",
    "measured_batch_law",
    "size_law",
    "training_law",
]
