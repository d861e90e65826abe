//! Tries the access to the InferencePools and the Gateway of a configuration, for `penstock doctor`: which verb on which resource is not permitted,
//! and whether each pool can be read.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::{Api, Client, api::PostParams};
use tokio::time::timeout;

use super::{
    client,
    failure::Failure,
    follow::Follower,
    gateway::GatewayFollower,
    query::{ENDPOINT_SLICES, GATEWAYS, HTTP_ROUTES, NAMESPACES, PODS, Query, REFERENCE_GRANTS, SERVICES, pools},
    selection::SelectionFollower,
};
use crate::{
    config::{Config, GatewayRef, InferencePoolRef, InferencePools, RefusedRoute},
    gateway::KnownGateway,
    inference_pools::{self, InferencePool, Known, Wanted},
    metrics::Metrics,
    tried::Trial,
};

/// How long one question to the API server may take, and how long reading a pool.
const ANSWER: Duration = Duration::from_secs(5);

/// Most refused rules of HTTPRoutes that are named.
const MOST_REFUSED: usize = 16;

/// Tries all of them. Returns what could be read.
pub async fn try_pools(config: &Config) -> (Known, Vec<Trial>) {
    let (mut known, mut trials) = (Known::default(), Vec::new());
    let gateway = config.kubernetes.gateway.as_ref();
    let wanted = Wanted::of(config);
    if wanted.is_empty() && gateway.is_none() {
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
    if let Some(named) = gateway {
        known.gateway = try_gateway(config, &client, named, &mut trials).await.map(Arc::new);
    }
    for section in wanted.sections {
        if let Some(pools) = try_section(config, &client, &section, &mut trials).await {
            known.selected.insert(section, pools);
        }
    }
    for named in inference_pools::used(config, &known) {
        let queries = [pools(named.version), PODS, SERVICES, ENDPOINT_SLICES]
            .map(|resource| Query::labelled(resource, &named.namespace, []));
        if is_permitted_to_read(&client, &format!("InferencePool {named}"), &queries, &mut trials).await {
            let (pool, trial) = try_pool(config, &client, &named).await;
            trials.push(trial);
            known.pools.extend(pool.map(|pool| (named, pool)));
        }
    }
    (known, trials)
}

/// Reads the InferencePools that a section selects.
async fn try_section(
    config: &Config,
    client: &Client,
    section: &InferencePools,
    trials: &mut Vec<Trial>,
) -> Option<Vec<InferencePoolRef>> {
    let subject = format!("InferencePools {section}");
    if !is_permitted_to_read(client, &subject, &[SelectionFollower::query(section)], trials).await {
        return None;
    }
    let (sender, mut first) = tokio::sync::mpsc::channel(1);
    let follower = SelectionFollower::new(client.clone(), section.clone(), Metrics::new(&[]), &config.kubernetes);
    let read = async {
        tokio::select! {
            never = follower.run(sender) => match never {},
            pools = first.recv() => pools,
        }
    };
    let Ok(Some((_, pools))) = timeout(ANSWER, read).await else {
        let advice = "see the log for the request that fails; `labels` has to be a label selector";
        trials.push(Trial::failed(subject, format!("could not be read within {ANSWER:?}"), advice));
        return None;
    };
    trials.push(Trial::ok(subject, format!("{} InferencePools", pools.len())));
    Some(pools)
}

/// Whether the agent may read these. Reports what it may not.
async fn is_permitted_to_read(client: &Client, subject: &str, queries: &[Query], trials: &mut Vec<Trial>) -> bool {
    let denied = denied(client, queries).await;
    trials.extend(denied.iter().cloned().map(|found| {
        let advice = "grant the agent's ServiceAccount get, list and watch on it; see docs/kubernetes.md";
        Trial::failed(format!("{subject}, access"), found, advice)
    }));
    denied.is_empty()
}

/// Those of the queries that the agent needs and cannot make.
async fn denied(client: &Client, queries: &[Query]) -> Vec<String> {
    let mut denied = Vec::new();
    for query in queries {
        for verb in ["list", "watch"] {
            match timeout(ANSWER, is_permitted(client, query, verb)).await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) if failure.reason == "unreachable" => return vec![failure.to_string()],
                Ok(Err(failure)) => denied.push(failure.to_string()),
                Err(_) => return vec![Failure::timed_out(verb, query).to_string()],
            }
        }
    }
    denied
}

/// Reads the Gateway with its routes. Reports what of it is not served.
async fn try_gateway(
    config: &Config,
    client: &Client,
    named: &GatewayRef,
    trials: &mut Vec<Trial>,
) -> Option<KnownGateway> {
    let subject = format!("Gateway {named}");
    let own = [GATEWAYS, HTTP_ROUTES].map(|resource| Query::labelled(resource, &named.namespace, []));
    if !is_permitted_to_read(client, &subject, &own, trials).await {
        return None;
    }
    let (sender, mut first) = tokio::sync::mpsc::channel(1);
    let follower = GatewayFollower::new(client.clone(), named.clone(), Metrics::new(&[]), &config.kubernetes);
    let read = async {
        tokio::select! {
            never = follower.run(sender) => match never {},
            objects = first.recv() => objects,
        }
    };
    let Ok(Some(objects)) = timeout(ANSWER, read).await else {
        // What of it is needed depends on the Gateway and its routes.
        let all = [HTTP_ROUTES, REFERENCE_GRANTS, NAMESPACES].map(|resource| Query::labelled(resource, "", []));
        if is_permitted_to_read(client, &subject, &all, trials).await {
            let advice = "see the log for the request that fails";
            trials.push(Trial::failed(subject, format!("could not be read within {ANSWER:?}"), advice));
        }
        return None;
    };
    if objects.gateway.is_none() {
        let advice = "correct `kubernetes.gateway`, or create it";
        trials.push(Trial::failed(subject, "does not exist".to_owned(), advice));
        return None;
    }
    let gateway = KnownGateway::new(named, objects);
    let (routes, pools) = (gateway.objects.routes.len(), gateway.meaning.pools.len());
    trials.push(Trial::ok(subject, format!("{routes} HTTPRoutes to {pools} InferencePools")));
    trials.extend(refused(&gateway).into_iter().take(MOST_REFUSED).map(|why| {
        Trial::failed(format!("Gateway {named}, {why}"), "its requests get 500".to_owned(), "correct the HTTPRoute")
    }));
    Some(gateway)
}

/// Why rules, or shares of them, are refused, each once.
fn refused(gateway: &KnownGateway) -> Vec<String> {
    let routes = &gateway.meaning.routes;
    let shares = routes.iter().flat_map(|route| route.pools.iter().filter_map(|share| share.refused.as_ref()));
    let all = routes.iter().filter_map(|route| route.refused.as_ref()).chain(shares);
    let wrong = all.filter(|why| matches!(why, RefusedRoute::Unsupported(_) | RefusedRoute::Backend(_)));
    let mut wrong: Vec<_> = wrong.map(ToString::to_string).collect();
    wrong.sort();
    wrong.dedup();
    wrong
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
