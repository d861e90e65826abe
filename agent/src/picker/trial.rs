//! Tries the EPP of a pool for `penstock doctor`: connects to each replica, asks it about a request, and says which setting mends
//! what is wrong.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{
    client::EppClient,
    connection,
    error::PickError,
    exchange::{ExchangeLimits, Outcome},
    handshake::Mismatch,
    reach,
    replica::{Replica, Replicas},
};
use crate::{
    budget::Budget,
    config::{Epp, Pool, ServerTls},
    dns::DnsResolver,
    tried::Trial,
};

/// How long an EPP may take to decide. It may queue requests for longer; then it is in use.
const DECISION: Duration = Duration::from_secs(5);
/// Most bytes of a body in the decision.
const BODY: usize = 1 << 20;
const NO_ENDPOINT: &str =
    "check which pods the EPP's InferencePool or its file of endpoints selects, and that they are ready";

/// Tries all replicas. `members` are the pool's endpoints.
pub async fn try_epp(pool: &Pool, epp: &Epp, members: &[SocketAddr], dns: &DnsResolver) -> Vec<Trial> {
    let name = |address: &str| format!("pool {}, EPP {address}", pool.name);
    let replicas = match Replicas::new(epp) {
        Ok(replicas) => Arc::new(replicas),
        Err(error) => {
            let advice = "correct the pool's `picker` section";
            return vec![Trial::failed(name(&epp.addresses.join(", ")), format!("{error:#}"), advice)];
        }
    };
    let mut trials = Vec::new();
    for (place, host) in replicas.names() {
        match dns.resolve(host).await {
            Ok(answer) => replicas.resolved(place, answer.addresses),
            Err(error) => {
                let advice = "correct `address` in the pool's `picker` section, or `[dns]`";
                trials.push(Trial::failed(name(host), format!("cannot be resolved: {error}"), advice));
            }
        }
    }
    let known = replicas.snapshot().replicas;
    trials.extend(join_all(known.iter().map(|replica| try_replica(pool, &replicas, replica, members))).await);
    trials
}

async fn try_replica(pool: &Pool, replicas: &Arc<Replicas>, replica: &Arc<Replica>, members: &[SocketAddr]) -> Trial {
    let address = replica.address.to_string();
    let shown =
        if replica.authority.as_str() == address { address } else { format!("{} ({address})", replica.authority) };
    let name = format!("pool {}, EPP {shown}", pool.name);
    match connection::connect(replicas, replica, &replica.address, replicas.tls.is_some(), None).await {
        Ok(_) => ask(pool, replicas, replica, members, name).await,
        Err(error) => {
            let cause = reach::cause(replicas, replica, &error).await;
            let advice = cause.map_or_else(|| advice(&replicas.settings, &error), |cause| cause.advice());
            let found = cause.map_or_else(|| error.to_string(), |cause| cause.to_string());
            Trial::failed(name, format!("cannot connect: {found}"), advice)
        }
    }
}

/// Asks the replica about a GET, as about a client's request.
async fn ask(
    pool: &Pool,
    replicas: &Arc<Replicas>,
    replica: &Arc<Replica>,
    members: &[SocketAddr],
    name: String,
) -> Trial {
    let limits = ExchangeLimits { replaced_body: BODY, memory: Budget::unlimited(), epp: replicas.settings.limits };
    let request = http::Request::get("/v1/models").header("host", "penstock").header("user-agent", "penstock doctor");
    let Ok(request) = request.body(()) else { return Trial::failed(name, "no request".to_owned(), "") };
    let client = EppClient::new(Arc::clone(replicas));
    let mut stream = client.open(replica, &request.into_parts().0, false, None, limits, None);
    let outcome = timeout(DECISION, stream.outcome()).await;
    let trial = match outcome {
        Ok(Ok(Outcome::Picked(decision))) => picked(pool, members, &decision.endpoints, name),
        Ok(Ok(Outcome::Immediate(reply))) => {
            let body = String::from_utf8_lossy(&reply.body).into_owned();
            let found = format!(
                "answers a request with {}: {:?}",
                reply.status,
                crate::text::cut(&body, crate::text::NAME).to_string()
            );
            if reply.status.is_server_error() {
                Trial::failed(name, found, NO_ENDPOINT)
            } else {
                Trial::ok(name, found)
            }
        }
        Ok(Err(error)) => {
            let advice = match &error {
                PickError::Status { code: tonic::Code::Unimplemented, .. } => {
                    "set `address` in the pool's `picker` section to the EPP's ext_proc port (9002 by default); this port has \
                     another gRPC service, such as the one for health checks"
                }
                PickError::NoDestination | PickError::ClosedWithoutPick => NO_ENDPOINT,
                PickError::BadDestination(_) => "the EPP has to name endpoints as ip:port",
                _ => "see the EPP's log",
            };
            Trial::failed(name, error.to_string(), advice)
        }
        Err(_) => Trial::failed(
            name,
            format!("did not decide about a request within {DECISION:?}"),
            "the EPP hangs, or holds requests back because its endpoints are saturated; see its log",
        ),
    };
    stream.end().await;
    trial
}

fn picked(pool: &Pool, members: &[SocketAddr], endpoints: &[SocketAddr], name: String) -> Trial {
    let shown = endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let admits = |endpoint: &SocketAddr| members.contains(endpoint) || pool.passthrough.admits(endpoint.ip());
    if endpoints.iter().any(admits) {
        return Trial::ok(name, format!("picks {shown}"));
    }
    let advice = "set `address` in the pool's `picker` section to the EPP of this pool, or list the endpoint in the pool, or set \
                  the pool's `passthrough`";
    Trial::failed(name, format!("picks {shown}, which the pool does not admit"), advice)
}

/// The setting that mends a failed connection.
fn advice(epp: &Epp, error: &io::Error) -> &'static str {
    use rustls::{AlertDescription as Alert, CertificateError as Bad, Error as Tls};
    if let Some(mismatch) = Mismatch::of(error) {
        return mismatch.advice();
    }
    match error.get_ref().and_then(|error| error.downcast_ref::<Tls>()) {
        // A new CA may have the name of the old one.
        Some(Tls::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)) => {
            "set `ca_file` in the pool's `picker` section to the CA of the EPP's certificate; a self-signed one needs \
             `tls = \"pinned\"` or `tls = \"insecure\"`"
        }
        Some(Tls::InvalidCertificate(Bad::NotValidForName | Bad::NotValidForNameContext { .. })) => {
            "set `server_name` in the pool's `picker` section to a name in the EPP's certificate"
        }
        Some(Tls::InvalidCertificate(
            Bad::Expired | Bad::ExpiredContext { .. } | Bad::NotValidYet | Bad::NotValidYetContext { .. },
        )) => "renew the EPP's certificate, or correct the clock of this machine",
        Some(Tls::General(_)) if matches!(epp.tls, ServerTls::Pinned(_)) => {
            "add the key to `pins` in the pool's `picker` section, if it is the EPP's"
        }
        Some(Tls::AlertReceived(Alert::CertificateRequired | Alert::UnknownCA | Alert::BadCertificate)) => {
            "set `client_cert_file` and `client_key_file` in the pool's `picker` section to what the EPP accepts"
        }
        Some(_) => "see `tls` in the pool's `picker` section",
        None if error.kind() == io::ErrorKind::ConnectionRefused => {
            "start the EPP, or correct `address` in the pool's `picker` section"
        }
        None => "correct `address` in the pool's `picker` section, or the network in between",
    }
}
