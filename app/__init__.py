"""The application: training, inference, evaluation, reporting, and the command line over them."""
