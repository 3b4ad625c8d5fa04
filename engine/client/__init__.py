"""Clients of a server: send a scan once, then ask about it, segment it, rank texts against it.

with M3DClient("localhost:8001") as client:
    study = client.upload("scan.nii.gz")
    for text in client.stream(study, "Describe the findings."):
        print(text, end="", flush=True)
    client.segment(study, "Please segment the liver.").save("liver.nii.gz")
"""

from engine.api import Answer, Ranking, Segmentation, Study
from engine.client.asynchronous import AsyncM3DClient
from engine.client.blocking import M3DClient
from engine.defaults import DEFAULT_URL

__all__ = ["DEFAULT_URL", "Answer", "AsyncM3DClient", "M3DClient", "Ranking", "Segmentation", "Study"]
