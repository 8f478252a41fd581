"""DICOM studies in, DICOM SEG out."""
