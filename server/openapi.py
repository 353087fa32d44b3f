"""The OpenAPI description of the API, for programs that make clients; api.txt is for people."""

from __future__ import annotations

FILE = {"type": "string", "format": "binary"}
FILES = {"type": "array", "items": FILE}
MARK = {"type": "string", "description": "any value"}
NUMBER = {"type": ["number", "null"]}
FAULTS = {
    400: "the upload cannot be used",
    401: "wrong user or password",
    403: "sent by a page of another host or port",
    408: "the upload was too slow",
    413: "the upload is too large",
    429: "too many wrong passwords; Retry-After says when to try again",
    500: "the server failed",
    503: "the queue or the disk is full, or the server is stopping; Retry-After says when to try "
    "again",
}


def fault(status: int) -> dict:
    schema = {"$ref": "#/components/schemas/Error"}
    answer: dict = {
        "description": FAULTS[status],
        "content": {"application/json": {"schema": schema}},
    }
    if status in (429, 503):
        seconds = {"type": "integer", "minimum": 1}
        answer["headers"] = {"Retry-After": {"description": "seconds", "schema": seconds}}
    return answer


def fields(**types: dict | list[str]) -> dict:
    """Describe an object; all of its fields are there."""
    return {"type": "object", "required": list(types), "properties": types}


SCHEMAS = {
    "Upload": {
        "type": "object",
        "description": "One case: images, or flair with pre and post, or phantom.",
        "properties": {
            "images": FILES | {
                "description": "a volume file (.nii, .nii.gz, .nrrd, .mha), slices (.tif, .png), "
                "the files of a DICOM study with their paths as file names, or a zip archive of "
                "one of these; several volume files are dated scans of one patient"
            },
            "flair": FILE | {"description": "instead of images: a volume file of FLAIR"},
            "pre": FILE | {"description": "beside flair: pre-contrast T1"},
            "post": FILE | {"description": "beside flair: post-contrast T1"},
            "register": MARK | {"description": "any value: move pre and post to fit flair"},
            "mask": FILES | {"description": "true mask to score against"},
            "phantom": MARK | {"description": "any value, alone: segment a synthetic head"},
        },
    },
    "Error": fields(error={"type": "string", "description": "what is wrong and what to do"}),
    "Progress": fields(waiting={"type": "string"}, done={"type": "number"}),
    "Health": fields(
        ready={"type": "boolean"},
        version={"type": ["string", "null"], "description": "commit; null outside git"},
        weights={
            "type": "object",
            "description": "SHA-256 of each weights file",
            "additionalProperties": {"type": "string"},
        },
        queue=fields(uploads={"type": "integer"}, places={"type": "integer"}),
    ),
    "Summary": {
        "type": "object",
        "description": "summary.json in the archive: a row of volumes.csv, with what follows",
        "required": ["case", "slices", "lesion_voxels", "warning", "notes", "scores"],
        "properties": {
            "case": {"type": "string"},
            "patient": {"type": "string"},
            "slices": {"type": "integer"},
            "lesion_voxels": {"type": "integer"},
            "lesion_ml": NUMBER | {"description": "null without a spacing"},
            "expected_dsc": NUMBER | {"description": "DSC with an expert's mask; null if unknown"},
            "warning": {"type": "string", "description": "why to look at the mask; empty: nothing"},
            "notes": {"type": "array", "items": {"type": "string"}},
            "spacing": {
                "type": ["array", "null"],
                "items": {"type": "number"},
                "description": "mm from slice to slice, row to row, column to column",
            },
            "trained_on": {"type": "boolean", "description": "the network has seen this patient"},
            "scores": {"type": ["object", "null"], "additionalProperties": NUMBER},
        },
    },
}  # fmt: skip

SEGMENT = {
    "operationId": "segment",
    "summary": "Segment one case",
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {"$ref": "#/components/schemas/Upload"}}},
    },
    "responses": {
        "200": {
            "description": "an archive with masks and probabilities in the geometry of the source, "
            "pictures, summary.json and summary.csv; or lines of JSON, if asked for by Accept: "
            "progress, and then all that the page shows, or an error",
            "content": {
                "application/zip": {"schema": FILE},
                "application/x-ndjson": {"schema": {"$ref": "#/components/schemas/Progress"}},
            },
        }
    }
    | {str(status): fault(status) for status in FAULTS},
}
HEALTH = {
    "operationId": "health",
    "summary": "Tell whether uploads are taken",
    "responses": {
        "200": {
            "description": "the server is ready",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Health"}}},
        }
    }
    | {str(status): fault(status) for status in (401, 429, 503)},
}
DESCRIPTION = {
    "openapi": "3.1.0",
    "info": {
        "title": "brainseg",
        "version": "1",
        "description": "Segments FLAIR abnormality. Research only, not for diagnosis or treatment.",
        "license": {"name": "MIT", "identifier": "MIT"},
    },
    "servers": [{"url": "/"}],
    "security": [{}, {"password": []}],
    "paths": {"/api/segment": {"post": SEGMENT}, "/api/health": {"get": HEALTH}},
    "components": {
        "schemas": SCHEMAS,
        "securitySchemes": {"password": {"type": "http", "scheme": "basic"}},
    },
}
