-- Runs once, when the volume of the Postgres container is new: the roles and databases of Scrip and of Temporal.
-- scrip_owner owns the tables and runs migrations; scrip_app, as which API and worker connect, owns nothing.
\getenv owner_password DATABASE_OWNER_PASSWORD
\getenv app_password DATABASE_APP_PASSWORD
\getenv temporal_password TEMPORAL_PASSWORD

create role scrip_owner login nosuperuser nocreatedb nocreaterole nobypassrls password :'owner_password';
create role scrip_app login nosuperuser nocreatedb nocreaterole nobypassrls password :'app_password';
create role temporal login nosuperuser nocreatedb nocreaterole nobypassrls password :'temporal_password';

create database scrip owner scrip_owner;
create database temporal owner temporal;
create database temporal_visibility owner temporal;

-- Neither of the two systems can look into the other's database.
revoke connect, temporary on database scrip, temporal, temporal_visibility from public;
grant connect, temporary on database scrip to scrip_app;
