"""Which model a name means, for all gateways: aliases, virtual models, upstreams, prices, rights and budgets."""
