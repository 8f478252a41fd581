"""Building blocks of the HTML pages: templates, tables, charts and pictures."""
