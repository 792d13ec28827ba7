//! Owns the scenarios: who publishes, who receives, and which routes connect them.

use std::collections::BTreeMap;

use clap::ValueEnum;
use edgehub_broker::amqp::{LinkAddress, LinkKind};
use serde_json::{Value, json};

use crate::identity::Identity;

/// Input that receiving modules listen on.
const INPUT: &str = "in1";
/// Output that publishing modules name.
const OUTPUT: &str = "out";
/// Time to live of queued messages in the generator's manifests, seconds.
const TTL_SECS: u32 = 7200;

/// A pattern of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// All devices to one module input
    FanIn,
    /// As many pairs of module output and module input as there are devices
    Pairs,
    /// One module output to as many module inputs as there are receivers
    FanOut,
    /// All devices to the upstream
    Upstream,
    /// All devices to the input of a module that is away
    Store,
    /// All devices connect, and nothing more
    Idle,
}

/// What a scenario needs, given the edge device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Route texts by name.
    pub routes: BTreeMap<String, String>,
    /// Who publishes.
    pub publishers: Vec<Party>,
    /// Who receives.
    pub receivers: Vec<Party>,
    /// Identities that must exist without a connection of their own.
    pub absent: Vec<Party>,
    /// Publishers that each receiver hears: all of them, or only the one with the receiver's own number.
    pub hears: Hears,
}

/// Whom a receiver hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hears {
    /// Every publisher.
    All,
    /// The publisher of the same number.
    Own,
}

/// One end of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// Device id.
    pub device: String,
    /// Module id; modules are on the edge device.
    pub module: Option<String>,
    /// Topic to publish to, or filter to subscribe to; AMQP: the address of the link.
    pub topic: String,
    /// Output of a publishing module, beside the address of its link.
    pub output: Option<&'static str>,
}

impl Party {
    fn leaf(number: usize) -> Self {
        let device = format!("load-d{number}");
        Self { topic: format!("devices/{device}/messages/events/"), device, module: None, output: None }
    }

    fn sender(edge: &str, number: usize) -> Self {
        let module = format!("load-s{number}");
        let topic = format!("devices/{edge}/modules/{module}/messages/events/%24.on={OUTPUT}");
        Self { device: edge.to_owned(), module: Some(module), topic, output: Some(OUTPUT) }
    }

    fn receiver(edge: &str, number: usize) -> Self {
        let module = format!("load-r{number}");
        let topic = format!("devices/{edge}/modules/{module}/inputs/#");
        Self { device: edge.to_owned(), module: Some(module), topic, output: None }
    }

    /// Address of the links on which the party sends its messages, and receives those for its inputs.
    fn node(&self, host: &str) -> String {
        let (device_id, module_id) = (self.device.clone(), self.module.clone());
        LinkAddress::Node { kind: LinkKind::Telemetry, device_id, module_id }.to_uri(host)
    }

    /// Whether the identity is this party's.
    pub fn is(&self, identity: &Identity) -> bool {
        (&self.device, &self.module) == (&identity.device, &identity.module)
    }
}

impl Scenario {
    /// The plan for `devices` publishers and `receivers` receivers where the scenario leaves their number free.
    pub fn plan(self, edge: &str, devices: usize, receivers: usize) -> Plan {
        let into =
            |number: usize| format!("INTO BrokeredEndpoint(\"/modules/load-r{number}/inputs/{INPUT}\")");
        let leaves = || (0..devices).map(Party::leaf).collect();
        let receiver = |number| Party::receiver(edge, number);
        let one = |text: String| BTreeMap::from([("r0".to_owned(), text)]);
        match self {
            Self::FanIn => Plan {
                routes: one(format!("FROM /messages/* {}", into(0))),
                publishers: leaves(),
                receivers: vec![receiver(0)],
                absent: Vec::new(),
                hears: Hears::All,
            },
            Self::Pairs => Plan {
                routes: (0..devices)
                    .map(|n| {
                        (
                            format!("r{n}"),
                            format!("FROM /messages/modules/load-s{n}/outputs/{OUTPUT} {}", into(n)),
                        )
                    })
                    .collect(),
                publishers: (0..devices).map(|n| Party::sender(edge, n)).collect(),
                receivers: (0..devices).map(receiver).collect(),
                absent: Vec::new(),
                hears: Hears::Own,
            },
            Self::FanOut => Plan {
                routes: (0..receivers)
                    .map(|n| {
                        (
                            format!("r{n}"),
                            format!("FROM /messages/modules/load-s0/outputs/{OUTPUT} {}", into(n)),
                        )
                    })
                    .collect(),
                publishers: vec![Party::sender(edge, 0)],
                receivers: (0..receivers).map(receiver).collect(),
                absent: Vec::new(),
                hears: Hears::All,
            },
            Self::Upstream | Self::Idle => Plan {
                routes: one("FROM /messages/* INTO $upstream".to_owned()),
                publishers: leaves(),
                receivers: Vec::new(),
                absent: Vec::new(),
                hears: Hears::All,
            },
            Self::Store => Plan {
                routes: one(format!("FROM /messages/* {}", into(0))),
                publishers: leaves(),
                receivers: Vec::new(),
                absent: vec![receiver(0)],
                hears: Hears::All,
            },
        }
    }
}

impl Plan {
    /// All parties.
    pub fn parties(&self) -> impl Iterator<Item = &Party> {
        self.publishers.iter().chain(&self.receivers).chain(&self.absent)
    }

    /// The same plan for a hub that is spoken to over AMQP: addresses of links instead of topics.
    pub fn for_amqp(mut self, host: &str) -> Self {
        for party in self.publishers.iter_mut().chain(&mut self.receivers) {
            party.topic = party.node(host);
        }
        self
    }

    /// The same plan for RabbitMQ over AMQP 1.0: a queue that is made by whoever attaches first, or an exchange to all
    /// receivers.
    pub fn for_rabbitmq(mut self) -> Self {
        let to_all = self.hears == Hears::All && self.receivers.len() > 1;
        let address = |number: usize| match (self.hears, to_all) {
            (Hears::All, true) => "/exchange/amq.fanout".to_owned(),
            (Hears::All, false) => "/queue/load".to_owned(),
            (Hears::Own, _) => format!("/queue/load-{number}"),
        };
        for parties in [&mut self.publishers, &mut self.receivers] {
            for (number, party) in parties.iter_mut().enumerate() {
                party.topic = address(number);
                party.output = None;
            }
        }
        self
    }

    /// The same plan for a broker that is no hub: topics without meaning, for comparisons in the same run.
    /// Needs a broker without authentication; routes do not exist there, so fan-in, fan-out and pairs only.
    pub fn for_plain_broker(mut self) -> Self {
        for (number, publisher) in self.publishers.iter_mut().enumerate() {
            publisher.topic = format!("load/{number}");
        }
        for (number, receiver) in self.receivers.iter_mut().enumerate() {
            receiver.topic = match self.hears {
                Hears::All => "load/#".to_owned(),
                Hears::Own => format!("load/{number}"),
            };
        }
        self
    }

    /// The deployment manifest that gives a hub the plan's routes.
    pub fn manifest(&self) -> Value {
        let image = json!({"type": "docker", "settings": {"image": "none", "createOptions": "{}"}});
        let mut hub = image.clone();
        hub["status"] = "running".into();
        hub["restartPolicy"] = "always".into();
        json!({"modulesContent": {
            "$edgeAgent": {"properties.desired": {
                "schemaVersion": "1.1",
                "runtime": {"type": "docker", "settings": {"minDockerVersion": "v1.25"}},
                "systemModules": {"edgeAgent": image, "edgeHub": hub},
                "modules": {},
            }},
            "$edgeHub": {"properties.desired": {
                "schemaVersion": "1.1",
                "routes": self.routes,
                "storeAndForwardConfiguration": {"timeToLiveSecs": TTL_SECS},
            }},
        }})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plan_s_routes_are_named_and_its_parties_distinct() {
        for scenario in Scenario::value_variants() {
            let plan = scenario.plan("edge1", 10, 20);
            let mut parties: Vec<_> = plan.parties().map(|party| (&party.device, &party.module)).collect();
            let all = parties.len();
            parties.sort();
            parties.dedup();
            assert_eq!(parties.len(), all, "{scenario:?}");
            let routes = &plan.manifest()["modulesContent"]["$edgeHub"]["properties.desired"]["routes"];
            assert_eq!(routes.as_object().map(serde_json::Map::len), Some(plan.routes.len()));
        }
    }

    #[test]
    fn every_route_compiles() {
        for scenario in Scenario::value_variants() {
            for text in scenario.plan("edge1", 3, 3).routes.values() {
                assert!(text.starts_with("FROM /messages/"), "{text}");
            }
        }
    }

    #[test]
    fn addresses_of_amqp_are_those_of_the_identities() {
        let plan = Scenario::Pairs.plan("edge1", 2, 0).for_amqp("gw");
        let node = |module: &str| format!("amqps://gw/devices/edge1/modules/{module}/messages/events");
        assert_eq!(plan.publishers[1].topic, node("load-s1"));
        assert_eq!(plan.publishers[1].output, Some("out"));
        assert_eq!(plan.receivers[1].topic, node("load-r1"));
        let queues = |scenario: Scenario| {
            let plan = scenario.plan("edge1", 2, 2).for_rabbitmq();
            (plan.publishers.last().unwrap().topic.clone(), plan.receivers.last().unwrap().topic.clone())
        };
        let both = |address: &str| (address.to_owned(), address.to_owned());
        assert_eq!(queues(Scenario::FanIn), both("/queue/load"));
        assert_eq!(queues(Scenario::Pairs), both("/queue/load-1"));
        assert_eq!(queues(Scenario::FanOut), both("/exchange/amq.fanout"));
    }
}
