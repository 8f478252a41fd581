"""The application: training, inference, evaluation, reports and the command line."""
