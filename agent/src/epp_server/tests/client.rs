//! A server on port 0, and the generated client that asks it.

use super::*;

pub(super) struct Epp {
    pub(super) address: SocketAddr,
    pub(super) channel: Channel,
    pub(super) stop: oneshot::Sender<()>,
    pub(super) served: JoinHandle<anyhow::Result<()>>,
}

impl Epp {
    pub(super) async fn start(config: EppServerConfig) -> Self {
        let listener = TcpListener::bind(config.listen).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(serve(config, listener, async {
            if stopped.await.is_err() {
                pending::<()>().await;
            }
        }));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { address, channel, stop, served }
    }

    pub(super) async fn open(&self) -> Exchange {
        let (asks, outbound) = mpsc::channel(64);
        let mut client = ExternalProcessorClient::new(self.channel.clone());
        let replies = timeout(SOON, client.process(ReceiverStream::new(outbound))).await.unwrap().unwrap().into_inner();
        Exchange { asks, replies, metadata: None }
    }

    pub(super) async fn with_subset(&self, subset: Kind) -> Exchange {
        let hint = [("x-gateway-destination-endpoint-subset".to_owned(), Value { kind: Some(subset) })].into();
        let filter_metadata = [("envoy.lb.subset_hint".to_owned(), Struct { fields: hint })].into();
        Exchange { metadata: Some(Metadata { filter_metadata }), ..self.open().await }
    }

    /// Picks for a request with a body. Its stream stays open.
    pub(super) async fn pick(&self) -> (String, Exchange) {
        let mut exchange = self.open().await;
        exchange.post(BODY).await;
        (exchange.picked().await, exchange)
    }
}

/// The proxy's side of one stream.
pub(super) struct Exchange {
    pub(super) asks: mpsc::Sender<ProcessingRequest>,
    pub(super) replies: Streaming<ProcessingResponse>,
    pub(super) metadata: Option<Metadata>,
}

impl Exchange {
    pub(super) async fn send(&self, request: Ask) {
        let metadata_context = self.metadata.clone();
        let ask = ProcessingRequest { request: Some(request), metadata_context, protocol_config: None };
        self.asks.send(ask).await.unwrap();
    }

    pub(super) async fn post(&self, body: &[u8]) {
        self.send(head("POST", false)).await;
        for piece in message::request_body(Bytes::copy_from_slice(body), true) {
            self.send(piece).await;
        }
    }

    pub(super) async fn next(&mut self) -> Option<ProcessingResponse> {
        timeout(SOON, self.replies.message()).await.expect("an answer").unwrap()
    }

    pub(super) async fn reply(&mut self) -> Reply {
        self.next().await.expect("one more message").response.unwrap()
    }

    pub(super) async fn header_reply(&mut self) -> (CommonResponse, String) {
        let message = self.next().await.expect("a header reply");
        let in_metadata = message::metadata_destination(message.dynamic_metadata.as_ref().unwrap()).unwrap();
        match message.response.unwrap() {
            Reply::RequestHeaders(reply) => (reply.response.unwrap(), in_metadata),
            other => panic!("not a header reply: {other:?}"),
        }
    }

    /// Reads the header reply and the body. Returns the destination.
    pub(super) async fn picked(&mut self) -> String {
        let (_, destination) = self.header_reply().await;
        self.request_pieces().await;
        destination
    }

    pub(super) async fn request_pieces(&mut self) -> Vec<Bytes> {
        let mut pieces = Vec::new();
        loop {
            let Reply::RequestBody(reply) = self.reply().await else { panic!("not a body reply") };
            let Mutation::StreamedResponse(piece) = reply.response.unwrap().body_mutation.unwrap().mutation.unwrap()
            else {
                panic!("not a streamed piece")
            };
            pieces.push(piece.body);
            if piece.end_of_stream {
                return pieces;
            }
        }
    }

    /// Reads the immediate reply, after which the stream has to end.
    pub(super) async fn refused(mut self) -> ImmediateResponse {
        let Reply::ImmediateResponse(reply) = self.reply().await else { panic!("not refused") };
        assert!(self.next().await.is_none(), "the stream ends with status OK");
        reply
    }

    pub(super) async fn respond(&mut self, served: SocketAddr) {
        self.metadata = message::metadata(None, Some(served));
        self.send(message::response_head(http::StatusCode::OK, &http::HeaderMap::new(), false)).await;
        assert!(matches!(self.reply().await, Reply::ResponseHeaders(_)));
    }
}

/// Dials with TLS and, as proxies do, without verification. The server has to negotiate HTTP/2.
pub(super) struct DialTls {
    pub(super) address: SocketAddr,
    pub(super) client_certificate: Option<config::ClientCertificate>,
}

impl Service<Uri> for DialTls {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = BoxFuture<'static, std::io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let (address, client_certificate) = (self.address, self.client_certificate.clone());
        Box::pin(async move {
            let epp =
                config::Epp { tls: ServerTls::Insecure, client_certificate, ..config::Epp::new(address.to_string()) };
            let connector = server_tls::Connectors::new(&epp.tls, epp.client_certificate.as_ref(), server_tls::H2)
                .unwrap()
                .unwrap()
                .current()
                .tls;
            let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
            let stream = connector.connect(name, TcpStream::connect(address).await?).await?;
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
            Ok(TokioIo::new(stream))
        })
    }
}
