"""The API server over real HTTPS, through the sandbox's own client and raw HTTP."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest
from apiserver_world import ADMIN, JANE, WIDGETS, Cluster, configmap, crd, pod, refused, run

from sandbox.apiserver.store import LOG_LENGTH
from sandbox.client import CONFIGMAPS, CRDS, DEPLOYMENTS, PDBS, PODS, Informer, Kind, Obj


def test_life_of_an_object(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        made = await one.api.create(CONFIGMAPS, configmap("a", k="v"), "default")
        assert made["kind"] == "ConfigMap"
        assert made["metadata"]["uid"]
        again = await refused(one.api.create(CONFIGMAPS, configmap("a"), "default"))
        assert (again.code, again.reason, str(again)) == (409, "AlreadyExists", 'configmaps "a" already exists')

        changed = await one.api.update(CONFIGMAPS, {**made, "data": {"k": "w"}})
        assert int(changed["metadata"]["resourceVersion"]) > int(made["metadata"]["resourceVersion"])
        stale = await refused(one.api.update(CONFIGMAPS, {**made, "data": {"k": "x"}}))
        assert stale.conflict
        assert "the object has been modified" in str(stale)
        unchanged = await one.api.update(CONFIGMAPS, changed)
        assert unchanged["metadata"]["resourceVersion"] == changed["metadata"]["resourceVersion"]

        await one.api.delete(CONFIGMAPS, "a", "default")
        gone = await refused(one.api.get(CONFIGMAPS, "a", "default"))
        assert gone.not_found
        assert gone.details == {"name": "a", "kind": "configmaps"}

    run(tmp_path, test)


def test_an_informer_misses_nothing_between_list_and_watch(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        seen: list[str] = []
        started, complete = asyncio.Event(), asyncio.Event()
        wanted = {f"c{i}" for i in range(60) if i % 3}
        living: set[str] = set()

        async def churn() -> None:
            for i in range(60):
                await one.api.create(CONFIGMAPS, configmap(f"c{i}"), "default")
                if i % 3 == 0:
                    await one.api.delete(CONFIGMAPS, f"c{i}", "default")
                if i == 5:
                    started.set()

        def note(type: str, obj: Obj, old: Obj | None) -> None:
            name = obj["metadata"]["name"]
            seen.append(f"{type} {name}")
            (living.discard if type == "DELETED" else living.add)(name)
            if living == wanted:
                complete.set()

        churning = asyncio.create_task(churn())
        await started.wait()
        async with Informer(one.api, CONFIGMAPS, "default", on_event=note).running():
            await churning
            await complete.wait()
        assert "DELETED c57" in seen
        assert len(seen) == len(set(seen))  # nothing twice

    run(tmp_path, test)


def test_leaving_a_selector_is_a_deletion_to_its_watch(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        _, since = await one.api.list(CONFIGMAPS, "default")
        await one.api.create(CONFIGMAPS, configmap("a", {"app": "x"}, k="1"), "default")
        await one.api.patch(CONFIGMAPS, "a", {"data": {"k": "2"}}, "default")
        await one.api.patch(CONFIGMAPS, "a", {"metadata": {"labels": {"app": "y"}}}, "default")
        await one.api.patch(CONFIGMAPS, "a", {"metadata": {"labels": {"app": "x"}}}, "default")
        events = []
        async for event in one.api.watch(CONFIGMAPS, "default", since=since, labels="app in (x)"):
            events.append((event.type, event.object["metadata"]["labels"]["app"]))
            if len(events) == 4:
                break
        assert events == [("ADDED", "x"), ("MODIFIED", "x"), ("DELETED", "x"), ("ADDED", "x")]

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ("app=x", ["a"]),
        ("app!=x", ["b", "c"]),
        ("app", ["a", "b"]),
        ("!app", ["c"]),
        ("app in (x,y),tier", ["b"]),
        ("tier notin (front)", ["a", "c"]),
        ("size>1", ["b"]),
    ],
)
def test_label_selectors(tmp_path: Path, labels: str, names: list[str]) -> None:
    async def test(one: Cluster) -> None:
        await one.api.create(CONFIGMAPS, configmap("a", {"app": "x", "size": "1"}), "default")
        await one.api.create(CONFIGMAPS, configmap("b", {"app": "y", "tier": "front", "size": "2"}), "default")
        await one.api.create(CONFIGMAPS, configmap("c"), "default")
        found, _ = await one.api.list(CONFIGMAPS, "default", labels=labels)
        assert [item["metadata"]["name"] for item in found] == names

    run(tmp_path, test)


def test_field_selectors_that_are_not_indexed_are_errors(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        await one.api.create(PODS, pod("here", nodeName="n1"), "default")
        await one.api.create(PODS, pod("nowhere"), "default")
        found, _ = await one.api.list(PODS, fields="spec.nodeName=n1")
        assert [item["metadata"]["name"] for item in found] == ["here"]
        for kind, fields in ((PODS, "spec.banana=1"), (DEPLOYMENTS, "spec.replicas=1"), (PODS, "nonsense")):
            assert (await refused(one.api.list(kind, fields=fields))).code == 400
        code, body = await one.raw("GET", "/api/v1/pods?banana=1")
        assert (code, body["reason"]) == (400, "BadRequest")

    run(tmp_path, test)


def test_a_watch_from_a_forgotten_version_is_410(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        direct = one.server.direct()
        _, since = await direct.list(CONFIGMAPS)
        await direct.create(CONFIGMAPS, configmap("a"), "default")
        for i in range(LOG_LENGTH + 1):
            await direct.patch(CONFIGMAPS, "a", {"data": {"k": str(i)}}, "default")

        async def watch() -> None:
            async for _ in one.api.watch(CONFIGMAPS, since=since):
                pass

        gone = await refused(watch())
        assert (gone.code, gone.reason) == (410, "Expired")

    run(tmp_path, test)


def test_bookmarks_and_the_end_of_a_watch(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        await one.api.create(CONFIGMAPS, configmap("a"), "default")
        path = "/api/v1/namespaces/default/configmaps?watch=1&timeoutSeconds=1&allowWatchBookmarks=true"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with one.session.get(one.url + path, headers=headers) as answer:
            lines = (await answer.text()).splitlines()
        assert [line[:20] for line in lines] == ['{"type":"ADDED","obj', '{"type":"BOOKMARK","']

    run(tmp_path, test)


def test_the_three_patches(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        template = {
            "metadata": {"labels": {"app": "web"}},
            "spec": {
                "containers": [
                    {"name": "a", "image": "a:1", "env": [{"name": "X", "value": "1"}]},
                    {"name": "b", "image": "b:1"},
                ]
            },
        }
        spec = {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template}
        await one.api.create(DEPLOYMENTS, {"metadata": {"name": "d"}, "spec": spec}, "default")

        change = {"spec": {"template": {"spec": {"containers": [{"name": "b", "image": "b:2"}]}}}}
        made = await one.api.patch(DEPLOYMENTS, "d", change, "default", type="strategic")
        images = [c["image"] for c in made["spec"]["template"]["spec"]["containers"]]
        assert images == ["a:1", "b:2"]
        assert made["metadata"]["generation"] == 2

        drop = {"spec": {"template": {"spec": {"containers": [{"name": "a", "$patch": "delete"}]}}}}
        made = await one.api.patch(DEPLOYMENTS, "d", drop, "default", type="strategic")
        assert [c["name"] for c in made["spec"]["template"]["spec"]["containers"]] == ["b"]

        made = await one.api.patch(DEPLOYMENTS, "d", {"metadata": {"labels": {"x": "y"}}}, "default")
        assert made["metadata"]["labels"] == {"x": "y"}
        assert made["metadata"]["generation"] == 3  # labels are not spec

        ops: list[Obj] = [
            {"op": "test", "path": "/spec/replicas", "value": 2},
            {"op": "replace", "path": "/spec/replicas", "value": 4},
        ]
        made = await one.api.patch(DEPLOYMENTS, "d", ops, "default", type="json")
        assert made["spec"]["replicas"] == 4
        assert (await refused(one.api.patch(DEPLOYMENTS, "d", ops, "default", type="json"))).code == 422

        status = await one.api.patch(
            DEPLOYMENTS, "d", {"status": {"replicas": 1}, "spec": {"replicas": 9}}, "default", sub="status"
        )
        assert (status["status"]["replicas"], status["spec"]["replicas"]) == (1, 4)
        spec_only = await one.api.patch(DEPLOYMENTS, "d", {"status": {"replicas": 8}}, "default")
        assert spec_only["status"]["replicas"] == 1

    run(tmp_path, test)


def test_custom_resources_are_pruned_defaulted_and_validated(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        before = await refused(one.api.list(WIDGETS))
        assert before.not_found
        await one.api.create(CRDS, crd(subresources={"status": {}}))
        body = {"metadata": {"name": "w"}, "spec": {"mode": "one", "banana": 1}, "status": {"phase": "x"}}
        made = await one.api.create(WIDGETS, body, "default")
        assert made["spec"] == {"mode": "one", "size": 3}
        assert "status" not in made

        bad = await refused(
            one.api.create(WIDGETS, {"metadata": {"name": "v"}, "spec": {"mode": "x", "size": 0}}, "default")
        )
        assert bad.code == 422
        assert 'spec.mode: Unsupported value: "x": supported values: "one", "all"' in str(bad)
        assert "spec.size in body should be greater than or equal to 1" in str(bad)

        status = await one.api.patch(WIDGETS, "w", {"status": {"phase": "on"}}, "default", sub="status")
        assert (status["status"], status["metadata"]["generation"]) == ({"phase": "on"}, 1)
        assert (await one.api.get(CRDS, "widgets.example.dev"))["status"]["acceptedNames"]["kind"] == "Widget"
        strategic = await refused(one.api.patch(WIDGETS, "w", {"spec": {"size": 4}}, "default", type="strategic"))
        assert strategic.code == 415

        await one.api.delete(CRDS, "widgets.example.dev")
        assert (await refused(one.api.list(WIDGETS))).not_found
        assert (await refused(one.api.get(CRDS, "widgets.example.dev"))).not_found

    run(tmp_path, test)


def test_cel_rules_are_refused_rather_than_ignored(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        rule = {"type": "object", "x-kubernetes-validations": [{"rule": "true"}]}
        assert "CEL rules are not supported" in str(await refused(one.api.create(CRDS, crd(rule))))

    run(tmp_path, test)


def test_a_bound_pod_waits_for_its_kubelet(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        made = await one.api.create(PODS, pod("p"), "default")
        tolerations = {entry["key"]: entry["tolerationSeconds"] for entry in made["spec"]["tolerations"]}
        assert set(tolerations.values()) == {7}
        assert made["spec"]["volumes"][0]["name"].startswith("kube-api-access-")
        await one.api.post(PODS, "p", "binding", {"target": {"kind": "Node", "name": "n1"}}, "default")
        twice = await refused(one.api.post(PODS, "p", "binding", {"target": {"name": "n2"}}, "default"))
        assert twice.conflict

        going = await one.api.delete(PODS, "p", "default")
        assert going["metadata"]["deletionGracePeriodSeconds"] == 30
        assert (await one.api.get(PODS, "p", "default"))["metadata"]["deletionTimestamp"]
        other = await refused(one.api.delete(PODS, "p", "default", grace=0, uid="someone-else"))
        assert other.conflict
        await one.api.delete(PODS, "p", "default", grace=0, uid=made["metadata"]["uid"])
        assert (await refused(one.api.get(PODS, "p", "default"))).not_found

        await one.api.create(PODS, pod("unbound"), "default")
        await one.api.delete(PODS, "unbound", "default")
        assert (await refused(one.api.get(PODS, "unbound", "default"))).not_found

    run(tmp_path, test)


def test_finalizers_hold_an_object(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        body = configmap("a")
        body["metadata"]["finalizers"] = ["example.dev/hold"]
        await one.api.create(CONFIGMAPS, body, "default")
        await one.api.delete(CONFIGMAPS, "a", "default")
        held = await one.api.get(CONFIGMAPS, "a", "default")
        assert held["metadata"]["deletionTimestamp"]
        more = {"metadata": {"finalizers": ["example.dev/hold", "example.dev/more"]}}
        assert (await refused(one.api.patch(CONFIGMAPS, "a", more, "default"))).code == 422
        await one.api.patch(CONFIGMAPS, "a", {"metadata": {"finalizers": None}}, "default")
        assert (await refused(one.api.get(CONFIGMAPS, "a", "default"))).not_found

    run(tmp_path, test)


def test_a_budget_refuses_an_eviction(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        for name in ("a", "b"):
            await one.api.create(PODS, pod(name, nodeName="n1"), "default")
            await one.api.patch(PODS, name, {"status": ready}, "default", sub="status")
        budget = {"metadata": {"name": "web"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "web"}}}}
        await one.api.create(PDBS, budget, "default")
        counted = {
            "observedGeneration": 1,
            "disruptionsAllowed": 1,
            "currentHealthy": 2,
            "desiredHealthy": 1,
            "expectedPods": 2,
        }
        await one.api.patch(PDBS, "web", {"status": counted}, "default", sub="status")

        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "a"}}
        other = {**eviction, "deleteOptions": {"preconditions": {"uid": "of-the-one-before"}}}
        assert (await refused(one.api.post(PODS, "a", "eviction", other, "default"))).code == 409
        left = await one.api.get(PODS, "a", "default")
        assert "deletionTimestamp" not in left["metadata"]
        assert left["status"]["conditions"] == ready["conditions"], "not even marked"
        await one.api.post(PODS, "a", "eviction", eviction, "default")
        evicted = await one.api.get(PODS, "a", "default")
        assert evicted["metadata"]["deletionTimestamp"]
        assert (await one.api.get(PDBS, "web", "default"))["status"]["disruptionsAllowed"] == 0
        eviction["metadata"] = {"name": "b"}
        blocked = await refused(one.api.post(PODS, "b", "eviction", eviction, "default"))
        assert (blocked.code, blocked.reason) == (429, "TooManyRequests")
        assert blocked.details["causes"][0]["reason"] == "DisruptionBudget"
        assert "deletionTimestamp" not in (await one.api.get(PODS, "b", "default"))["metadata"]

    run(tmp_path, test)


def test_rights_are_needed_and_granted_by_roles(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        pods = "/api/v1/namespaces/default/pods"
        code, body = await one.raw("GET", pods, JANE)
        assert code == 403
        assert body["message"] == (
            'pods is forbidden: User "jane" cannot list resource "pods" in API group "" in the namespace "default"'
        )
        assert (await one.raw("GET", pods, "wrong"))[0] == 401
        review = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        ask = {"spec": {"resourceAttributes": {"namespace": "default", "verb": "list", "resource": "pods"}}}
        assert (await one.raw("POST", review, JANE, json=ask))[1]["status"] == {"allowed": False}

        rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/"
        role = {"metadata": {"name": "r"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]}
        await one.raw("POST", rbac + "roles", json=role)
        binding = {
            "metadata": {"name": "b"},
            "roleRef": {"kind": "Role", "name": "r"},
            "subjects": [{"kind": "User", "name": "jane"}],
        }
        await one.raw("POST", rbac + "rolebindings", json=binding)
        assert (await one.raw("GET", pods, JANE))[0] == 200
        assert (await one.raw("POST", review, JANE, json=ask))[1]["status"]["allowed"] is True
        assert (await one.raw("DELETE", pods, JANE))[0] == 403
        assert (await one.raw("GET", "/api/v1/namespaces/kube-system/pods", JANE))[0] == 403

    run(tmp_path, test)


def test_service_account_tokens_authenticate_until_the_account_is_gone(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        accounts = Kind("", "v1", "serviceaccounts", "ServiceAccount")
        await one.api.create(accounts, {"metadata": {"name": "robot"}}, "default")
        made = await one.api.post(accounts, "robot", "token", {"spec": {"expirationSeconds": 600}}, "default")
        token = made["status"]["token"]
        who = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
        code, body = await one.raw("POST", who, token, json={})
        assert code == 201
        assert body["status"]["userInfo"]["username"] == "system:serviceaccount:default:robot"
        assert "system:serviceaccounts:default" in body["status"]["userInfo"]["groups"]
        assert (await one.raw("GET", "/api/v1/pods", token))[0] == 403
        assert (await one.raw("POST", who, token[:-2] + "AA", json={}))[0] == 401
        await one.api.delete(accounts, "robot", "default")
        assert (await one.raw("POST", who, token, json={}))[0] == 401

    run(tmp_path, test)


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        path = "/api/v1/namespaces/default/configmaps"
        code, body = await one.raw("POST", path + "?dryRun=All", json=configmap("a", k="v"))
        assert (code, "resourceVersion" in body["metadata"]) == (201, False)
        assert (await one.raw("GET", path + "/a"))[0] == 404
        await one.raw("POST", path, json=configmap("a", k="v"))
        version = one.server.core.store.version
        code, body = await one.raw(
            "PATCH",
            path + "/a?dryRun=All",
            json={"data": {"k": "w"}},
            headers={"Content-Type": "application/merge-patch+json"},
        )
        assert (code, body["data"]) == (200, {"k": "w"})
        assert (await one.raw("DELETE", path + "/a?dryRun=All"))[0] == 200
        assert (await one.raw("GET", path + "/a"))[1]["data"] == {"k": "v"}
        assert one.server.core.store.version == version
        assert (await one.raw("POST", path + "?dryRun=yes", json=configmap("b")))[0] == 422

    run(tmp_path, test)


def test_a_stateful_set_mounts_its_claims(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        path = "/apis/apps/v1/namespaces/default/statefulsets"
        template = {"metadata": {"labels": {"app": "web"}}, **pod("p")}
        template["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
        claim = {"metadata": {"name": "data"}, "spec": {"accessModes": ["ReadWriteOnce"]}}
        spec = {"selector": {"matchLabels": {"app": "web"}}, "template": template, "volumeClaimTemplates": [claim]}
        code, made = await one.raw("POST", path, json={"metadata": {"name": "s"}, "spec": spec})
        assert code == 201, made
        assert "volumes" not in made["spec"]["template"]["spec"]
        claim["metadata"]["name"] = "other"
        code, answer = await one.raw("POST", path, json={"metadata": {"name": "t"}, "spec": spec})
        assert (code, answer["details"]["causes"][0]["message"]) == (422, 'Not found: "data"')

    run(tmp_path, test)


def test_unknown_fields_are_warned_of_or_refused(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        path = one.url + "/api/v1/namespaces/default/pods"
        body = pod("p")
        body["spec"]["containers"][0]["imagePullPolice"] = "Always"
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with one.session.post(path + "?fieldValidation=Strict", json=body, headers=headers) as answer:
            assert answer.status == 400
            assert 'unknown field "spec.containers[0].imagePullPolice"' in (await answer.json())["message"]
        async with one.session.post(path, json=body, headers=headers) as answer:
            assert answer.status == 201
            assert "imagePullPolice" in answer.headers["Warning"]
            assert "imagePullPolice" not in (await answer.json())["spec"]["containers"][0]
        code, wrong = await one.raw("POST", "/api/v1/namespaces/default/pods", json=pod("q", containers="none"))
        assert code == 400
        assert "cannot unmarshal string into Go struct field PodSpec.spec.containers" in wrong["message"]

    run(tmp_path, test)


def test_what_nothing_acts_on_is_not_accepted(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        code, body = await one.raw(
            "POST",
            "/apis/networking.k8s.io/v1/namespaces/default/ingresses",
            json={"metadata": {"name": "i"}, "spec": {}},
        )
        assert (code, body["reason"]) == (501, "NotImplemented")
        code, body = await one.raw(
            "PATCH",
            "/apis/apps/v1/namespaces/default/deployments/a/scale?fieldManager=m",
            json={},
            headers={"Content-Type": "application/apply-patch+yaml"},
        )
        assert code == 415
        assert "not applied on the server side" in body["message"]

    run(tmp_path, test)


def test_pages_show_one_snapshot(tmp_path: Path) -> None:
    async def test(one: Cluster) -> None:
        path = "/api/v1/namespaces/default/configmaps"
        for name in "abc":
            await one.api.create(CONFIGMAPS, configmap(name), "default")
        _, first = await one.raw("GET", path, params={"limit": "2"})
        assert first["metadata"]["remainingItemCount"] == 1
        await one.api.delete(CONFIGMAPS, "c", "default")
        _, last = await one.raw("GET", path, params={"limit": "2", "continue": first["metadata"]["continue"]})
        assert [item["metadata"]["name"] for item in last["items"]] == ["c"]
        assert last["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]

    run(tmp_path, test)


def test_clients_that_hang_up_at_once_are_no_errors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A client may go at any point of its request; the log's tracebacks are for what is wrong with the server."""

    async def test(one: Cluster) -> None:
        port = int(one.url.rpartition(":")[2])
        trust = ssl.create_default_context(cadata=one.tls.ca_pem)
        ask = f"GET /api/v1/pods?watch=1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n\r\n"
        for _ in range(50):
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trust, server_hostname="127.0.0.1")
            writer.write(ask.encode())
            writer.close()  # question and farewell arrive together
        status, _ = await one.raw("GET", "/api/v1/pods")
        assert status == 200

    run(tmp_path, test)
    assert not caplog.records
