"""Object detection: forget object kinds in detectors of transformers (Deformable DETR, DETR, YOLOS, RT-DETR)."""
