//! The file's sections into the structures of [`super`], with the checks that concern one section or the whole.

use std::path::PathBuf;

use super::{
    Admin, Config, ErrorFormat, Errors, Limits, Listen, Overrides, Steering, SteeringMode, Timeouts, bbr, dns,
    document::Section, headers, listen, node, pools, process, routes, tracing, value,
};
use crate::listeners::Listeners;

const MIB: u32 = 1 << 20;

pub(super) fn config(root: &mut Section<'_>, overrides: &Overrides) -> Config {
    let listen = root.section("listen", |section| listen::listen(section, overrides));
    let admin = root.section("admin", |section| admin(section, overrides, &listen));
    let limits = root.section("limits", limits);
    let timeouts = root.section("timeouts", timeouts);
    let headers = root.section("headers", headers::headers);
    let errors = root.section("errors", errors);
    let bbr = root.section("bbr", bbr::bbr);
    let steering = root.section("steering", |section| steering(section, overrides));
    let tracing = root.section("tracing", tracing::tracing);
    let process = root.section("process", process::process);
    let node = root.section("node", |section| node::node(section, overrides));
    let dns = root.section("dns", dns::dns);
    let tls = listen.tls.as_ref().map(|tls| tls.address);
    let own = Listeners::new([listen.address, admin.address].into_iter().chain(tls));
    let pools = pools::pools(root, listen.address, &own, &node);
    let routes = routes::routes(root, &pools, &bbr);
    Config {
        listen,
        admin,
        limits,
        timeouts,
        headers,
        errors,
        bbr,
        steering,
        tracing,
        process,
        node,
        dns,
        pools,
        routes,
    }
}

fn admin(section: &mut Section<'_>, overrides: &Overrides, listen: &Listen) -> Admin {
    let address = section.read("address", value::listen_address);
    let address = overrides.admin.or(address).unwrap_or(Admin::default().address);
    if listen::collide(address, listen.address) {
        section.reject("address", address, format_args!("another port than listen.address ({})", listen.address));
    } else if let Some(tls) = &listen.tls
        && listen::collide(address, tls.address)
    {
        section.reject("address", address, format_args!("another port than listen.tls.address ({})", tls.address));
    }
    Admin { address }
}

fn limits(section: &mut Section<'_>) -> Limits {
    let default = Limits::default();
    let limits = Limits {
        head_bytes: section.read("head_bytes", value::integer(1024..=1 << 20)).unwrap_or(default.head_bytes),
        headers: section.read("headers", value::integer(16..=1024)).unwrap_or(default.headers),
        body_bytes: section.read("body_bytes", value::integer(1..=1 << 40)).unwrap_or(default.body_bytes),
        body_memory_bytes: section
            .read("body_memory_bytes", value::integer(0..=1 << 30))
            .unwrap_or(default.body_memory_bytes),
        total_body_bytes: section
            .read("total_body_bytes", value::integer(0..=1 << 50))
            .unwrap_or(default.total_body_bytes),
        total_spill_bytes: section
            .read("total_spill_bytes", value::integer(0..=1 << 50))
            .unwrap_or(default.total_spill_bytes),
        decoded_body_bytes: section
            .read("decoded_body_bytes", value::integer(1..=1 << 40))
            .unwrap_or(default.decoded_body_bytes),
        body_min_rate: section.read("body_min_rate", value::integer(0..=1 << 30)).unwrap_or(default.body_min_rate),
        metric_models: section.read("metric_models", value::integer(0..=10_000)).unwrap_or(default.metric_models),
        linger_bytes: section.read("linger_bytes", value::integer(0..=1 << 40)).unwrap_or(default.linger_bytes),
    };
    // The default of one must not turn a smaller value of the other into an error.
    if section.has("body_memory_bytes") && limits.body_memory_bytes as u64 > limits.body_bytes {
        let expected = format_args!("at most limits.body_bytes ({})", limits.body_bytes);
        section.reject("body_memory_bytes", limits.body_memory_bytes, expected);
    }
    limits
}

fn timeouts(section: &mut Section<'_>) -> Timeouts {
    let default = Timeouts::default();
    Timeouts {
        head: section.read("head", value::duration_or_off).unwrap_or(default.head),
        body: section.read("body", value::duration_or_off).unwrap_or(default.body),
        keep_alive: section.read("keep_alive", value::duration_or_off).unwrap_or(default.keep_alive),
        connect: section.read("connect", value::duration_or_off).unwrap_or(default.connect),
        first_byte: section.read("first_byte", value::duration_or_off).unwrap_or(default.first_byte),
        idle: section.read("idle", value::duration_or_off).unwrap_or(default.idle),
        request: section.read("request", value::duration_or_off).unwrap_or(default.request),
        endpoint_keep_alive: section
            .read("endpoint_keep_alive", value::duration)
            .unwrap_or(default.endpoint_keep_alive),
        endpoint_unreachable: section
            .read("endpoint_unreachable", value::seconds_or_off)
            .unwrap_or(default.endpoint_unreachable),
        drain: section.read("drain", value::duration).unwrap_or(default.drain),
        lame_duck: section.read("lame_duck", value::duration_or_off).unwrap_or(default.lame_duck),
        linger: section.read("linger", value::duration).unwrap_or(default.linger),
        client_unreachable: section
            .read("client_unreachable", value::seconds_or_off)
            .unwrap_or(default.client_unreachable),
    }
}

fn errors(section: &mut Section<'_>) -> Errors {
    const FORMATS: &[(&str, ErrorFormat)] = &[("openai", ErrorFormat::OpenAi), ("plain", ErrorFormat::Plain)];
    Errors { format: section.read("format", value::one_of(FORMATS)).unwrap_or(Errors::default().format) }
}

fn steering(section: &mut Section<'_>, overrides: &Overrides) -> Steering {
    const MODES: &[(&str, SteeringMode)] = &[
        ("auto", SteeringMode::Auto),
        ("local", SteeringMode::Local),
        ("ingress", SteeringMode::Ingress),
        ("off", SteeringMode::Off),
    ];
    let default = Steering::default();
    let mode = section.read("mode", value::one_of(MODES));
    // The kernel keeps 16 KiB of a send buffer free (`SendBuffer::has_room`): with no more than that nothing would be steered.
    let send_buffer = value::integer(32_768..=64 * MIB);
    let receive_buffer = value::integer(16_384..=64 * MIB);
    let steering = Steering {
        mode: overrides.steering.or(mode).unwrap_or(default.mode),
        cgroup: section.read("cgroup", value::non_empty).filter(|path| path != "auto").map(PathBuf::from),
        min_bytes: section.read("min_bytes", value::integer(0..=1 << 40)).unwrap_or(default.min_bytes),
        max_remote_bytes: section
            .read("max_remote_bytes", value::integer(0..=1 << 40))
            .unwrap_or(default.max_remote_bytes),
        client_send_buffer: section.read("client_send_buffer", send_buffer).unwrap_or(default.client_send_buffer),
        endpoint_receive_buffer: section
            .read("endpoint_receive_buffer", receive_buffer)
            .unwrap_or(default.endpoint_receive_buffer),
        max_flows: section.read("max_flows", value::integer(1..=1_048_576)).unwrap_or(default.max_flows),
        force: section.read("force", value::boolean).unwrap_or(default.force) || overrides.force,
    };
    // 0 is the way to say "nothing remote"; between 0 and min_bytes the two only contradict each other.
    if (1..steering.min_bytes).contains(&steering.max_remote_bytes) {
        let expected = format_args!("0, or at least steering.min_bytes ({})", steering.min_bytes);
        section.reject("max_remote_bytes", steering.max_remote_bytes, expected);
    }
    steering
}
