//! Tries the access to the InferencePools of a configuration, for `penstock doctor`: which verb on which resource is not permitted,
//! and whether each pool can be read.

use std::time::Duration;

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};
use tokio::time::timeout;

use super::{
    client,
    failure::Failure,
    follow::Follower,
    query::{ENDPOINT_SLICES, PODS, Query, SERVICES, pools},
};
use crate::{
    config::{Config, InferencePoolRef},
    inference_pools::{self, InferencePool, KnownPools},
    metrics::Metrics,
    tried::Trial,
};

/// How long one question to the API server may take, and how long reading a pool.
const ANSWER: Duration = Duration::from_secs(5);

/// Tries all of them. Returns what could be read.
pub async fn try_pools(config: &Config) -> (KnownPools, Vec<Trial>) {
    let (named, mut known, mut trials) = (inference_pools::named(config), KnownPools::new(), Vec::new());
    if named.is_empty() {
        return (known, trials);
    }
    let client = match client::client(&config.kubernetes).await {
        Ok(client) => client,
        Err(error) => {
            let advice = "set `kubernetes.kubeconfig`, or run in a Pod with a ServiceAccount";
            trials.push(Trial::failed("Kubernetes API".to_owned(), format!("{error:#}"), advice));
            return (known, trials);
        }
    };
    for named in named {
        let denied = denied(&client, &named).await;
        trials.extend(denied.iter().cloned().map(|found| {
            let advice = "grant the agent's ServiceAccount get, list and watch on it; see docs/kubernetes.md";
            Trial::failed(format!("InferencePool {named}, access"), found, advice)
        }));
        if denied.is_empty() {
            let (pool, trial) = try_pool(config, &client, &named).await;
            trials.push(trial);
            known.extend(pool.map(|pool| (named, pool)));
        }
    }
    (known, trials)
}

/// What the agent needs for a pool and cannot do.
async fn denied(client: &Client, named: &InferencePoolRef) -> Vec<String> {
    let mut denied = Vec::new();
    for resource in [pools(named.version), PODS, SERVICES, ENDPOINT_SLICES] {
        let query = Query::labelled(resource, &named.namespace, []);
        for verb in ["list", "watch"] {
            match timeout(ANSWER, is_permitted(client, &query, verb)).await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) if failure.reason == "unreachable" => return vec![failure.to_string()],
                Ok(Err(failure)) => denied.push(failure.to_string()),
                Err(_) => return vec![Failure::timed_out(verb, &query).to_string()],
            }
        }
    }
    denied
}

/// Asks the API server, and if that is not permitted either, tries.
async fn is_permitted(client: &Client, query: &Query, verb: &'static str) -> Result<(), Failure> {
    match review(client, query, verb).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::forbidden(verb, query)),
        Err(kube::Error::Api(status)) if status.code == 403 => attempt(client, query, verb).await,
        Err(error) => Err(Failure::new(&error, verb, query)),
    }
}

/// Whether the agent may do this, in the words of the API server.
async fn review(client: &Client, query: &Query, verb: &str) -> Result<bool, kube::Error> {
    let resource_attributes = Some(ResourceAttributes {
        group: Some(query.resource.group.to_owned()),
        namespace: Some(query.namespace.clone()),
        resource: Some(query.resource.plural.to_owned()),
        verb: Some(verb.to_owned()),
        ..ResourceAttributes::default()
    });
    let spec = SelfSubjectAccessReviewSpec { resource_attributes, ..SelfSubjectAccessReviewSpec::default() };
    let question = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
    let answer = Api::all(client.clone()).create(&PostParams::default(), &question).await?;
    Ok(answer.status.is_some_and(|status| status.allowed))
}

async fn attempt(client: &Client, query: &Query, verb: &'static str) -> Result<(), Failure> {
    let failed = |error: &kube::Error| Failure::new(error, verb, query);
    let built = if verb == "list" { query.list(None) } else { query.watch("0", Duration::from_secs(1)) };
    let request = built.map_err(|error| failed(&kube::Error::BuildRequest(error)))?;
    if verb == "list" {
        client.request::<serde_json::Value>(request).await.map(drop).map_err(|error| failed(&error))
    } else {
        client.request_events::<serde_json::Value>(request).await.map(drop).map_err(|error| failed(&error))
    }
}

async fn try_pool(config: &Config, client: &Client, named: &InferencePoolRef) -> (Option<InferencePool>, Trial) {
    let name = format!("InferencePool {named}");
    let (sender, mut first) = tokio::sync::mpsc::channel(1);
    let follower = Follower::new(client.clone(), named.clone(), Metrics::new(&[]), &config.kubernetes);
    let read = async {
        tokio::select! {
            never = follower.run(sender) => match never {},
            pool = first.recv() => pool.map(|(_, pool)| pool),
        }
    };
    let Ok(Some(pool)) = timeout(ANSWER, read).await else {
        let advice = "see the log for the request that fails";
        return (None, Trial::failed(name, format!("could not be read within {ANSWER:?}"), advice));
    };
    let trial = match &pool {
        InferencePool::Absent => {
            Trial::failed(name, "does not exist".to_owned(), "correct `inference_pool` in the pool, or create it")
        }
        InferencePool::Invalid(why) => {
            Trial::failed(name, why.clone(), "correct the InferencePool, or what it refers to")
        }
        InferencePool::Usable(usable) => {
            let ready = usable.endpoints.iter().filter(|endpoint| !endpoint.draining).count();
            let replicas = usable.epp.as_ref().map_or(0, |epp| epp.replicas.len());
            Trial::ok(name, format!("{ready} ready endpoints, {replicas} EPP replicas"))
        }
    };
    (Some(pool), trial)
}
