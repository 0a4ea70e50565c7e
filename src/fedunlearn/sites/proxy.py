"""The reverse proxy before a SuperLink: it publishes what nodes need and nothing else."""

PROXY_PORT = 8443

_NGINX = """\
# Publishes /v1/fleet/ of a SuperLink that listens on loopback, and nothing else: its Control and Runtime APIs are on the same port,
# and whoever reaches them can run code on every node.
# In /etc/nginx/conf.d/; server.crt, server.key and ca.crt are those of server.yaml.
server {{
    listen {proxy_port} ssl;
    server_name {host};
    ssl_certificate     {folder}/server.crt;
    ssl_certificate_key {folder}/server.key;
    ssl_protocols       TLSv1.2 TLSv1.3;

    location / {{ return 404; }}

    location ~ ^/v1/fleet/[a-z-]+$ {{
        limit_except POST {{ deny all; }}
        proxy_pass https://127.0.0.1:{port};
        proxy_ssl_trusted_certificate {folder}/ca.crt;
        proxy_ssl_verify on;
        proxy_ssl_name localhost;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        client_max_body_size 0;          # an adapter is one request
        proxy_request_buffering off;
        proxy_buffering off;
        proxy_read_timeout 300s;
        proxy_send_timeout 300s;
    }}
}}
"""


def nginx_conf(host: str, port: int, folder: str = "/etc/fedunlearn") -> str:
    """The site of nginx for a server. host: by which nodes come. port: of the SuperLink. folder: where nginx reads the certificates."""
    return _NGINX.format(host=host, port=port, folder=folder, proxy_port=PROXY_PORT)
