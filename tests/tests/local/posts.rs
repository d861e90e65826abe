//! POSTs to real servers in every mode. A socket in a map must stay readable: nginx and the JVM call FIONREAD, which several
//! kernels answer with 0 there. `cargo xtask posts` covers more servers and larger bodies.

use penstock_agent::config::SteeringMode;
use penstock_tests::{
    posts::{self, MODES, SHORT},
    servers::{Kind, RealServer},
};

const RUNS: usize = 10;

async fn every_post_is_answered(kind: Kind) {
    let server = RealServer::start(kind).await.unwrap_or_else(|error| panic!("{error:#}"));
    for mode in MODES {
        let local = matches!(mode, SteeringMode::Auto | SteeringMode::Local);
        // Steering starts after the bytes already written. The Java server writes a whole response at once, and others may be as
        // fast: the posts are repeated until the kernel has carried a part of a response to them.
        let mut carried = 0;
        for _ in 0..RUNS {
            let tally = posts::run(&server, mode, SHORT).await.unwrap_or_else(|error| panic!("{error:#}"));
            println!("{mode:?}: {tally}");
            carried += tally.local;
            if carried > 0 || !local || kind == Kind::JavaNio {
                break;
            }
        }
        assert!(carried > 0 || !local || kind == Kind::JavaNio, "{mode:?}: the kernel carried nothing in {RUNS} runs");
        assert!(carried == 0 || local, "{mode:?}: {carried} bytes by the path local");
    }
}

macro_rules! servers {
    ($($name:ident: $kind:ident;)+) => {
        $(#[tokio::test] async fn $name() { every_post_is_answered(Kind::$kind).await; })+
    };
}

servers! {
    nginx_answers_every_post: Nginx;
    java_nio_answers_every_post: JavaNio;
    uvicorn_answers_every_post: Uvicorn;
    go_answers_every_post: Go;
}
