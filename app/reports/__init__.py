"""Complete HTML pages: runs, cohorts, comparisons, cross-validations, rankings and the demo."""
