from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NetworksRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NetworksReply(_message.Message):
    __slots__ = ("networks",)
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    networks: _containers.RepeatedCompositeFieldContainer[Network]
    def __init__(self, networks: _Optional[_Iterable[_Union[Network, _Mapping]]] = ...) -> None: ...

class Network(_message.Message):
    __slots__ = ("name", "mode", "state", "bridge", "subnets", "pods", "free", "about")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BRIDGE_FIELD_NUMBER: _ClassVar[int]
    SUBNETS_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    name: str
    mode: str
    state: str
    bridge: str
    subnets: _containers.RepeatedScalarFieldContainer[str]
    pods: int
    free: int
    about: str
    def __init__(self, name: _Optional[str] = ..., mode: _Optional[str] = ..., state: _Optional[str] = ..., bridge: _Optional[str] = ..., subnets: _Optional[_Iterable[str]] = ..., pods: _Optional[int] = ..., free: _Optional[int] = ..., about: _Optional[str] = ...) -> None: ...

class CheckNetworksRequest(_message.Message):
    __slots__ = ("pod_ids",)
    POD_IDS_FIELD_NUMBER: _ClassVar[int]
    pod_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pod_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class NetworkFinding(_message.Message):
    __slots__ = ("pod_id", "network", "troubles")
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    NETWORK_FIELD_NUMBER: _ClassVar[int]
    TROUBLES_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    network: str
    troubles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, pod_id: _Optional[str] = ..., network: _Optional[str] = ..., troubles: _Optional[_Iterable[str]] = ...) -> None: ...

class RemoveNetworkRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PruneNetworksRequest(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: bool
    def __init__(self, settings: _Optional[bool] = ...) -> None: ...

class RemovedNetworks(_message.Message):
    __slots__ = ("networks", "settings", "kept")
    NETWORKS_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    networks: _containers.RepeatedCompositeFieldContainer[Network]
    settings: _containers.RepeatedScalarFieldContainer[str]
    kept: str
    def __init__(self, networks: _Optional[_Iterable[_Union[Network, _Mapping]]] = ..., settings: _Optional[_Iterable[str]] = ..., kept: _Optional[str] = ...) -> None: ...

class AuditRequest(_message.Message):
    __slots__ = ("repair",)
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    repair: bool
    def __init__(self, repair: _Optional[bool] = ...) -> None: ...

class AuditReply(_message.Message):
    __slots__ = ("findings",)
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[AuditFinding]
    def __init__(self, findings: _Optional[_Iterable[_Union[AuditFinding, _Mapping]]] = ...) -> None: ...

class AuditFinding(_message.Message):
    __slots__ = ("kind", "name", "owner", "state", "text", "hint", "outcome", "mended")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MENDED_FIELD_NUMBER: _ClassVar[int]
    kind: str
    name: str
    owner: str
    state: str
    text: str
    hint: str
    outcome: str
    mended: bool
    def __init__(self, kind: _Optional[str] = ..., name: _Optional[str] = ..., owner: _Optional[str] = ..., state: _Optional[str] = ..., text: _Optional[str] = ..., hint: _Optional[str] = ..., outcome: _Optional[str] = ..., mended: _Optional[bool] = ...) -> None: ...

class SupervisedRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SupervisedReply(_message.Message):
    __slots__ = ("containers",)
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    containers: _containers.RepeatedCompositeFieldContainer[SupervisedContainer]
    def __init__(self, containers: _Optional[_Iterable[_Union[SupervisedContainer, _Mapping]]] = ...) -> None: ...

class SupervisedContainer(_message.Message):
    __slots__ = ("pod_id", "container_id", "policy", "restarts", "state", "next_start", "health", "failing_streak", "probes")
    POD_ID_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NEXT_START_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    FAILING_STREAK_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    pod_id: str
    container_id: str
    policy: str
    restarts: int
    state: str
    next_start: int
    health: str
    failing_streak: int
    probes: _containers.RepeatedCompositeFieldContainer[Probe]
    def __init__(self, pod_id: _Optional[str] = ..., container_id: _Optional[str] = ..., policy: _Optional[str] = ..., restarts: _Optional[int] = ..., state: _Optional[str] = ..., next_start: _Optional[int] = ..., health: _Optional[str] = ..., failing_streak: _Optional[int] = ..., probes: _Optional[_Iterable[_Union[Probe, _Mapping]]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("started_at", "finished_at", "exit_code", "output")
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    started_at: int
    finished_at: int
    exit_code: int
    output: str
    def __init__(self, started_at: _Optional[int] = ..., finished_at: _Optional[int] = ..., exit_code: _Optional[int] = ..., output: _Optional[str] = ...) -> None: ...

class LogLevelRequest(_message.Message):
    __slots__ = ("level",)
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    level: str
    def __init__(self, level: _Optional[str] = ...) -> None: ...

class LogLevelReply(_message.Message):
    __slots__ = ("level", "before")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    level: str
    before: str
    def __init__(self, level: _Optional[str] = ..., before: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("container_id", "image", "timeout")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    image: str
    timeout: int
    def __init__(self, container_id: _Optional[str] = ..., image: _Optional[str] = ..., timeout: _Optional[int] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("container_id", "trouble")
    CONTAINER_ID_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    container_id: str
    trouble: str
    def __init__(self, container_id: _Optional[str] = ..., trouble: _Optional[str] = ...) -> None: ...

class Credentials(_message.Message):
    __slots__ = ("server_address", "username", "password", "identity_token", "registry_token")
    SERVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    USERNAME_FIELD_NUMBER: _ClassVar[int]
    PASSWORD_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    server_address: str
    username: str
    password: str
    identity_token: str
    registry_token: str
    def __init__(self, server_address: _Optional[str] = ..., username: _Optional[str] = ..., password: _Optional[str] = ..., identity_token: _Optional[str] = ..., registry_token: _Optional[str] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("image", "auth")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    image: str
    auth: Credentials
    def __init__(self, image: _Optional[str] = ..., auth: _Optional[_Union[Credentials, _Mapping]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("image", "target", "auth", "whole", "origin_auth")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_AUTH_FIELD_NUMBER: _ClassVar[int]
    image: str
    target: str
    auth: Credentials
    whole: bool
    origin_auth: Credentials
    def __init__(self, image: _Optional[str] = ..., target: _Optional[str] = ..., auth: _Optional[_Union[Credentials, _Mapping]] = ..., whole: _Optional[bool] = ..., origin_auth: _Optional[_Union[Credentials, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("blob", "done", "total", "state", "image_id", "digest")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    blob: str
    done: int
    total: int
    state: str
    image_id: str
    digest: str
    def __init__(self, blob: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., state: _Optional[str] = ..., image_id: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class ImageRequest(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: str
    def __init__(self, image: _Optional[str] = ...) -> None: ...

class TagRequest(_message.Message):
    __slots__ = ("image", "name")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    image: str
    name: str
    def __init__(self, image: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ImageReply(_message.Message):
    __slots__ = ("image_id", "name")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    name: str
    def __init__(self, image_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("images", "docker")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    DOCKER_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[str]
    docker: bool
    def __init__(self, images: _Optional[_Iterable[str]] = ..., docker: _Optional[bool] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("data", "name")
    DATA_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    name: str
    def __init__(self, data: _Optional[bytes] = ..., name: _Optional[str] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[LoadedImage]
    def __init__(self, images: _Optional[_Iterable[_Union[LoadedImage, _Mapping]]] = ...) -> None: ...

class LoadedImage(_message.Message):
    __slots__ = ("image_id", "names")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, image_id: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class HistoryReply(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[HistoryEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[HistoryEntry, _Mapping]]] = ...) -> None: ...

class HistoryEntry(_message.Message):
    __slots__ = ("created", "created_by", "comment", "size", "layer")
    CREATED_FIELD_NUMBER: _ClassVar[int]
    CREATED_BY_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    created: str
    created_by: str
    comment: str
    size: int
    layer: str
    def __init__(self, created: _Optional[str] = ..., created_by: _Optional[str] = ..., comment: _Optional[str] = ..., size: _Optional[int] = ..., layer: _Optional[str] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, images: _Optional[_Iterable[str]] = ...) -> None: ...

class RepairRequest(_message.Message):
    __slots__ = ("image", "auth")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    image: str
    auth: Credentials
    def __init__(self, image: _Optional[str] = ..., auth: _Optional[_Union[Credentials, _Mapping]] = ...) -> None: ...

class Finding(_message.Message):
    __slots__ = ("image_id", "kind", "name", "trouble", "repaired")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    kind: str
    name: str
    trouble: str
    repaired: bool
    def __init__(self, image_id: _Optional[str] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., trouble: _Optional[str] = ..., repaired: _Optional[bool] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("image", "auth")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    image: str
    auth: Credentials
    def __init__(self, image: _Optional[str] = ..., auth: _Optional[_Union[Credentials, _Mapping]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("depth", "text")
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    depth: int
    text: str
    def __init__(self, depth: _Optional[int] = ..., text: _Optional[str] = ...) -> None: ...

class OutdatedRequest(_message.Message):
    __slots__ = ("images", "auth")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    AUTH_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[str]
    auth: _containers.RepeatedCompositeFieldContainer[Credentials]
    def __init__(self, images: _Optional[_Iterable[str]] = ..., auth: _Optional[_Iterable[_Union[Credentials, _Mapping]]] = ...) -> None: ...

class Freshness(_message.Message):
    __slots__ = ("name", "image_id", "here", "there", "trouble")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    HERE_FIELD_NUMBER: _ClassVar[int]
    THERE_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    image_id: str
    here: str
    there: str
    trouble: str
    def __init__(self, name: _Optional[str] = ..., image_id: _Optional[str] = ..., here: _Optional[str] = ..., there: _Optional[str] = ..., trouble: _Optional[str] = ...) -> None: ...
