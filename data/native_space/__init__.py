"""Native scans to the BraTS grid, and predictions back to the scanner's grid."""
