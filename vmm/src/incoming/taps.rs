//! Whether the taps that an incoming machine is to have here can be used, without changing anything.

use godwit_core::Refusal;

use super::{HostOptions, places};
use crate::description::Described;
use crate::devices::virtio::net::link::Port;
use crate::devices::virtio::net::tap;
use crate::error::chain;
use crate::preflight::net::objections;

/// Every reason why the taps cannot be used. Which may be used at all is not judged here.
pub(super) fn check(machine: &Described, options: &HostOptions) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if let (false, Err(error)) = (machine.config.nets.is_empty(), tap::check_host()) {
        refusals.push(Refusal::new("net", chain(&error)));
    }
    for (net, source) in machine.config.nets.iter().zip(&machine.taps) {
        let Ok(name) = places::tap(net, options) else { continue };
        let reasons = match Port::find(&name) {
            Ok(here) => objections(&name, source, here.as_ref()),
            Err(error) => vec![format!("cannot find out about tap {name}: {error}")],
        };
        refusals.extend(reasons.into_iter().map(|reason| Refusal::new(format!("net {}", net.id), reason)));
    }
    refusals
}
