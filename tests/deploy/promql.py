"""What a query asks for."""

from __future__ import annotations

import promql_parser


def metrics_of(expression: promql_parser.Expr) -> set[str]:
    """The names of all metrics of a parsed query, however deep."""
    match expression:
        case promql_parser.VectorSelector():
            return {expression.name} if expression.name else set()
        case promql_parser.MatrixSelector():
            return metrics_of(expression.vector_selector)
        case promql_parser.BinaryExpr():
            return metrics_of(expression.lhs) | metrics_of(expression.rhs)
        case promql_parser.Call():
            return set().union(*map(metrics_of, expression.args))
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return set()
        case _:  # an aggregation, parentheses, a sign, a subquery
            return metrics_of(expression.expr)
