"""The page at ``/``: a playground and a dashboard, static files of this package and one JSON feed."""
