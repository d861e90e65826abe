//! Attaches the programs to interfaces, by links of TCX or as filters of the clsact qdisc, pins what outlives the process, and
//! removes it.

use std::{fs, io};

use aya::{
    Ebpf,
    programs::{
        LinkOrder, ProgramError, ProgramInfo, SchedClassifier, TcAttachType,
        links::FdLink,
        tc::{NlOptions, SchedClassifierLinkId, TcAttachOptions, TcError, qdisc_add_clsact},
    },
};
use nix::net::if_::if_nametoindex;

use super::{GUARD_PROGRAM, WIRE_PROGRAM, WireError, interface, pins::Instance, qdisc};
use crate::kernel::{LoadError, bpf};

/// Beginnings of the names in an agent's folder: links of TCX, programs that are filters of an interface, and interfaces whose clsact
/// qdisc the agent has created.
const LINK: &str = "link_";
const FILTER: &str = "filter_";
const CLSACT: &str = "clsact_";

/// What is attached by this process.
pub(super) struct Attached {
    /// Links that end with the process.
    links: Vec<(&'static str, SchedClassifierLinkId)>,
    /// Interfaces whose clsact qdisc was created.
    qdiscs: Vec<u32>,
    /// Whether to try TCX.
    pub(super) tcx: bool,
}

pub(super) fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut SchedClassifier, LoadError> {
    Ok(ebpf.program_mut(name).ok_or(LoadError::Missing(name))?.try_into()?)
}

impl Attached {
    pub(super) fn none() -> Self {
        Self { links: Vec::new(), qdiscs: Vec::new(), tcx: true }
    }

    /// Attaches to an interface of this thread's network namespace: before other programs at ingress, after them at egress. Uses TCX
    /// if the kernel has it (Linux 6.6), otherwise the clsact qdisc, which is created if it is missing. With an instance, both
    /// outlive the process.
    pub(super) fn attach(&mut self, ebpf: &mut Ebpf, name: &str, instance: Option<&Instance>) -> Result<(), WireError> {
        let failed = |why: &dyn std::fmt::Display| WireError::Attach(name.to_owned(), why.to_string());
        if !interface::is_ethernet(name).map_err(|error| failed(&error))? {
            return Err(failed(&"its packets have no Ethernet header"));
        }
        let index = if_nametoindex(name).map_err(|error| failed(&error))?;
        let places = [
            // At egress first: a flow must not begin while its sockets can still be heard.
            (GUARD_PROGRAM, TcAttachType::Egress, LinkOrder::last(), u16::MAX),
            (WIRE_PROGRAM, TcAttachType::Ingress, LinkOrder::first(), 1),
        ];
        for (which, place, order, priority) in places {
            let classifier = program(ebpf, which)?;
            let tcx = TcAttachOptions::TcxOrder(order);
            let link = match self.tcx.then(|| classifier.attach_with_options(name, place, tcx)) {
                None | Some(Err(ProgramError::SyscallError(_))) => {
                    self.create_qdisc(name, index, instance)?;
                    let options = NlOptions { priority, ..NlOptions::default() };
                    classifier.attach_with_options(name, place, TcAttachOptions::Netlink(options))
                }
                Some(attached) => attached,
            };
            let link = link.map_err(|error| failed(&error))?;
            match instance {
                Some(instance) => {
                    keep(classifier, which, link, instance, index)
                        .map_err(|error| WireError::Pin(error.to_string()))?;
                }
                None => self.links.push((which, link)),
            }
        }
        Ok(())
    }

    fn create_qdisc(&mut self, name: &str, index: u32, instance: Option<&Instance>) -> Result<(), WireError> {
        match (qdisc_add_clsact(name), instance) {
            (Ok(()), Some(instance)) => instance.create(&format!("{CLSACT}{index}"))?,
            (Ok(()), None) => self.qdiscs.push(index),
            (Err(TcError::AlreadyAttached), _) => {}
            // The kernel says so with EEXIST; any other failure shows when the program is attached.
            (Err(error), _) => tracing::debug!(interface = name, %error, "clsact qdisc not created"),
        }
        Ok(())
    }

    /// Detaches what does not outlive the process.
    pub(super) fn detach(&mut self, ebpf: &mut Ebpf) {
        for (which, link) in self.links.drain(..) {
            let detached = program(ebpf, which).and_then(|program| Ok(program.detach(link)?));
            if let Err(error) = detached {
                tracing::debug!(%error, program = which, "could not detach a program");
            }
        }
        for interface in self.qdiscs.drain(..) {
            if let Err(error) = qdisc::remove_if_empty(interface) {
                tracing::debug!(%error, interface, "could not remove the clsact qdisc");
            }
        }
    }
}

/// Pins a link of TCX. A filter of a qdisc stays by itself, and its program is pinned so that it can be found again.
fn keep(
    classifier: &mut SchedClassifier,
    which: &str,
    link: SchedClassifierLinkId,
    instance: &Instance,
    interface: u32,
) -> anyhow::Result<()> {
    let link = classifier.take_link(link)?;
    if <&FdLink>::try_from(&link).is_ok() {
        FdLink::try_from(link)?.pin(instance.folder.at(&format!("{LINK}{interface}_{which}")))?;
    } else {
        // Dropping it would detach the program.
        std::mem::forget(link);
        classifier.pin(instance.folder.at(&format!("{FILTER}{interface}_{which}")))?;
    }
    Ok(())
}

/// The interfaces to which programs of an agent's folder are attached.
pub(super) fn interfaces(instance: &Instance) -> Vec<u32> {
    let names = instance.folder.names().unwrap_or_default();
    let index = |name: &String| {
        let rest = name.strip_prefix(LINK).or_else(|| name.strip_prefix(FILTER))?;
        rest.split_once('_')?.0.parse().ok()
    };
    names.iter().filter_map(index).collect()
}

/// Whether the interfaces of all links in a folder are gone, so that nothing can be attached any more. A filter of a qdisc cannot tell.
pub(super) fn is_defunct(instance: &Instance) -> bool {
    let Ok(names) = instance.folder.names() else { return false };
    names.iter().all(|name| {
        let is_link = name.starts_with(LINK);
        !name.starts_with(FILTER)
            && (!is_link || bpf::interface_of_link(&instance.folder.at(name)).is_ok_and(|at| at == 0))
    })
}

/// Detaches and unpins everything in an agent's folder, of any version, and removes the folder. A clsact qdisc that the agent created
/// and others use passes to `heir`.
pub(super) fn remove(instance: &Instance, heir: Option<&Instance>) -> io::Result<()> {
    let mut names = instance.folder.names()?;
    // Filters before the qdisc.
    names.reverse();
    for name in names {
        let path = instance.folder.at(&name);
        if let Some(interface) = name.strip_prefix(CLSACT) {
            let interface = interface.parse().map_err(|_| io::ErrorKind::InvalidData)?;
            if !qdisc::remove_if_empty(interface)?
                && let Some(heir) = heir
            {
                heir.create(&name)?;
            }
            fs::remove_dir(path)?;
            continue;
        }
        if let Some((interface, _)) = name.strip_prefix(FILTER).and_then(|rest| rest.split_once('_')) {
            let interface = interface.parse().map_err(|_| io::ErrorKind::InvalidData)?;
            let program = ProgramInfo::from_pin(&path).map_err(io::Error::other)?;
            qdisc::remove_program(interface, program.id())?;
        }
        if name.starts_with(LINK) {
            // Fails if the interface is gone.
            let _ = bpf::detach_link(&path);
        }
        fs::remove_file(path)?;
    }
    instance.remove_folder()
}
