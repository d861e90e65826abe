//! Tries what a configuration names, for `penstock doctor`: the certificate for clients, each EPP and each endpoint.

mod certificate;
mod files;

use std::{
    io,
    net::SocketAddr,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, future::join_all, stream};
use tokio::{net::TcpStream, time::timeout};

pub use files::unreadable;

pub use crate::tried::Trial;

use crate::{
    config::{AppProtocol, Config, EndpointsFormat, Picker, Pool, parse_endpoints},
    dns::DnsResolver,
    endpoint::tls::{EndpointTls, is_handshake_error},
    inference_pools, kubernetes,
    picker::{
        handshake::{self, Mismatch},
        trial::try_epp,
    },
};

/// Endpoints that are tried at once.
const AT_ONCE: usize = 32;
/// How long connecting may take if the configuration does not limit it.
const CONNECT: Duration = Duration::from_secs(5);

/// Tries everything, and takes some seconds if something does not answer.
pub async fn try_all(config: &Config) -> Vec<Trial> {
    let dns = DnsResolver::new(&config.dns);
    let (known, kubernetes) = kubernetes::try_pools(config).await;
    let config = &inference_pools::spelled_out(config, &known);
    let pools = config.pools.iter().map(|pool| try_pool(config, pool, &dns));
    let pools = join_all(pools).await.into_iter().flatten();
    certificate::try_certificate(config, SystemTime::now()).into_iter().chain(kubernetes).chain(pools).collect()
}

async fn try_pool(config: &Config, pool: &Pool, dns: &DnsResolver) -> Vec<Trial> {
    let (members, mut trials) = members(config, pool, dns).await;
    if let Picker::Epp(epp) = &pool.picker {
        trials.extend(try_epp(pool, epp, &members, dns).await);
    }
    let limit = config.timeouts.connect.unwrap_or(CONNECT);
    let endpoints = members.into_iter().chain(pool.default_upstream).map(|address| try_endpoint(pool, address, limit));
    trials.extend(stream::iter(endpoints).buffered(AT_ONCE).collect::<Vec<_>>().await);
    trials
}

/// The endpoints of the pool's sources that take requests, and the sources that failed.
async fn members(config: &Config, pool: &Pool, dns: &DnsResolver) -> (Vec<SocketAddr>, Vec<Trial>) {
    let (mut endpoints, mut trials) = (pool.endpoints.clone(), Vec::new());
    if let Some(file) = &pool.endpoints_file {
        let name = format!("pool {}, endpoints_file", pool.name);
        let parsed = match tokio::fs::read_to_string(file).await {
            Ok(text) => parse_endpoints(&text, EndpointsFormat::of(file), &pool.ports, config.listen.address)
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match parsed {
            Ok(parsed) => endpoints.extend(parsed),
            Err(error) => trials.push(Trial::failed(
                name,
                format!("{}: {error}", file.display()),
                "correct the file, or `endpoints_file` in the pool",
            )),
        }
    }
    if let Some(named) = &pool.endpoints_dns {
        match dns.resolve(&named.name).await {
            Ok(answer) => {
                let at = |ip| named.ports.iter().map(move |&port| SocketAddr::new(ip, port).into());
                endpoints.extend(answer.addresses.into_iter().flat_map(at));
            }
            Err(error) => trials.push(Trial::failed(
                format!("pool {}, endpoints_dns", pool.name),
                format!("cannot be resolved: {error}"),
                "correct `endpoints_dns` in the pool, or `[dns]`",
            )),
        }
    }
    let mut members: Vec<SocketAddr> = Vec::new();
    for endpoint in endpoints.iter().filter(|endpoint| !endpoint.draining) {
        if !members.contains(&endpoint.address) {
            members.push(endpoint.address);
        }
    }
    (members, trials)
}

async fn try_endpoint(pool: &Pool, address: SocketAddr, limit: Duration) -> Trial {
    let name = format!("pool {}, endpoint {address}", pool.name);
    let connect = async {
        match pool.app_protocol {
            AppProtocol::Http1 => TcpStream::connect(address).await.map(drop),
            AppProtocol::Https => {
                let tls = EndpointTls::new(pool).map_err(io::Error::other)?;
                let tls = tls.ok_or(io::ErrorKind::InvalidInput)?;
                tls.connect(TcpStream::connect(address).await?, address).await.map(drop)
            }
            AppProtocol::H2c => handshake::connect(&address.into(), None, drop).await.map(drop),
        }
    };
    match timeout(limit, connect).await {
        Ok(Ok(())) => Trial::ok(name, "accepts connections".to_owned()),
        Ok(Err(error)) => {
            let advice = match Mismatch::of(&error) {
                Some(Mismatch::Http1) => "set `app_protocol = \"http1\"` in the pool",
                Some(Mismatch::Tls) => "set `app_protocol = \"https\"` in the pool, if its endpoints speak HTTP/1.1",
                Some(_) => "correct `app_protocol` in the pool",
                None if is_handshake_error(&error) => "correct the pool's `tls` section, or `app_protocol`",
                None => "start the model server, or remove the endpoint from the pool",
            };
            let found = match Mismatch::of(&error) {
                Some(mismatch) => mismatch.answer().to_owned(),
                None => error.to_string(),
            };
            Trial::failed(name, format!("cannot connect: {found}"), advice)
        }
        Err(_) => Trial::failed(
            name,
            format!("accepted no connection within {limit:?}"),
            "start the model server, or correct the pool's endpoints or the network in between",
        ),
    }
}
